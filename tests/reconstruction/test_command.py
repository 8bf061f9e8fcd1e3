"""`compressx reconstruct`: a saved model, a file of rules and a folder of examples."""

import json
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

import compressx as cx
from compressx import cli


class Small(nn.Module):
    """Two layers of 6 units."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Dense(6)(x))
        return nn.Dense(6)(x)


@pytest.fixture
def files(tmp_path: Any) -> Any:
    """A dense model, rules, and 40 examples in two files."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 6)).astype(np.float32)
    variables = Small().init(jax.random.key(0), x)
    cx.save_model(tmp_path / "dense.safetensors", variables, [])
    cx.write_rules(tmp_path / "rules.json", [("params/.*/kernel", cx.unstructured(0.4))])
    (tmp_path / "examples").mkdir()
    np.save(tmp_path / "examples" / "a.npy", x[:25])
    np.save(tmp_path / "examples" / "b.npy", x[25:])
    return tmp_path


def arguments(folder: Any, *more: str) -> list[str]:
    named = ["--rules", str(folder / "rules.json"), "--examples", str(folder / "examples")]
    files = [str(folder / "dense.safetensors"), str(folder / "small.safetensors")]
    return ["reconstruct", *files, *named, "--model", f"{__name__}:Small", *more]


def test_a_saved_model_is_brought_into_its_sets(files: Any, capsys: Any) -> None:
    assert cli.main(arguments(files, "--count", "32", "--batch", "16", "--json")) == 0
    said = capsys.readouterr()
    data = json.loads(said.out)
    assert data["examples"] == 32 and len(data["layers"]) == 2 and 0 < data["agreement"] <= 1
    assert said.err.splitlines()[0].startswith("1/2 params/Dense_0/kernel: error")
    assert cli.main(["verify", str(files / "small.safetensors")]) == 0
    saved = cx.load_model(files / "small.safetensors")
    assert int((saved.params["params"]["Dense_0"]["kernel"] != 0).sum()) == 14


def test_what_does_not_fit_is_named(files: Any, capsys: Any) -> None:
    np.save(files / "examples" / "c.npy", np.zeros((3, 5), np.float32))
    assert cli.main(arguments(files)) == 2
    assert "c.npy: float32 [3, 5] are no examples" in capsys.readouterr().err
    for file in (files / "examples").iterdir():
        file.unlink()
    assert cli.main(arguments(files)) == 2
    assert "holds no .npy file of examples" in capsys.readouterr().err
