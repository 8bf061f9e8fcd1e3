"""Dense weights from a safetensors file: our paths, PyTorch's names, what is refused; the driver starts from one."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from compressx.tree import paths
from configs import cnn as configs
from experiments.cnn import config as cnn_config
from experiments.cnn import task as cnn
from experiments.common import models
from experiments.common.models import convert, plain_file
from experiments.common.models.convert import CheckpointError


def drawn(model, shape: tuple[int, ...]):
    like = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
    rng = np.random.default_rng(0)
    return like, jax.tree.map(lambda x: np.asarray(rng.standard_normal(x.shape), np.float32), like)


def same(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("sign", ["/", "."])
def test_the_driver_starts_from_our_paths(sign: str, tmp_path: Path) -> None:
    model = models.build("digits_cnn", classes=10)
    _, variables = drawn(model, (1, 8, 8, 1))
    names = [p.replace("/", sign) for p in paths(variables)]
    save_file(dict(zip(names, jax.tree.leaves(variables), strict=True)), tmp_path / "w.safetensors")
    config = configs.get_config("digits_tiny").to_dict()
    config["model"]["checkpoint"] = "w.safetensors"
    first = cnn.first_weights(cnn_config.read(config), model, (8, 8, 1), str(tmp_path))
    same(first.params, {"params": variables["params"]})


def test_pytorchs_names_are_read(tmp_path: Path) -> None:
    model = models.build("resnet20", classes=10)
    like, variables = drawn(model, (1, 32, 32, 3))
    save_file(convert.to_torch(variables), tmp_path / "w.safetensors")
    same(plain_file.load(tmp_path / "w.safetensors", like), variables)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model = models.build("digits_cnn", classes=10)
    like, variables = drawn(model, (1, 8, 8, 1))
    arrays = dict(zip(paths(variables), jax.tree.leaves(variables), strict=True))
    path = tmp_path / "w.safetensors"
    kernel = arrays["params/c1/kernel"]
    for changed, text in (
        ({"params/c1/kernel": kernel[..., :3]}, "params/c1/kernel is float32 .* expected float32"),
        ({"params/c1/kernel": kernel.astype(np.float16)}, "params/c1/kernel is float16"),
        ({"params/c1/kernel": kernel * np.nan}, "params/c1/kernel holds values that are not finite"),
        ({"params/c9/kernel": kernel}, "not the variables of this network .*c9"),
    ):
        save_file({**arrays, **changed}, path)
        with pytest.raises(CheckpointError, match=text):
            plain_file.load(path, like)
    path.write_bytes(b"0" * 20)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        plain_file.load(path, like)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        plain_file.load(tmp_path / "none.safetensors", like)
