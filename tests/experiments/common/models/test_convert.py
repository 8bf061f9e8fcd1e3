import os
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.models import CifarResNet, convert
from tests.thinning import some


def folder():
    root = os.environ.get("COMPRESSX_DATA")
    if not root or not (Path(root) / "checkpoints").is_dir():
        pytest.skip("needs the CIFAR ResNet checkpoints in $COMPRESSX_DATA/checkpoints")
    return Path(root)


@pytest.fixture(scope="module")
def small():
    """A narrow ResNet-8 with its variables, all values distinct, and the same under PyTorch's names."""
    model = CifarResNet(blocks=1, classes=3)
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.5, 1.0, s.shape).astype(np.float32)), variables)
    return model, variables, convert.to_torch(variables)


def write(path, arrays):
    np.savez(path, **arrays)
    return path


def test_names_and_layouts(small):
    _, variables, arrays = small
    kernel = variables["params"]["layer2_0"]["conv1"]["kernel"]
    assert arrays["layer2.0.conv1.weight"].shape == (32, 16, 3, 3)
    assert arrays["layer2.0.conv1.weight"][5, 4, 2, 1] == kernel[2, 1, 4, 5]
    assert arrays["linear.weight"][2, 60] == variables["params"]["linear"]["kernel"][60, 2]
    np.testing.assert_array_equal(arrays["bn1.weight"], variables["params"]["bn1"]["scale"])
    np.testing.assert_array_equal(arrays["bn1.running_var"], variables["batch_stats"]["bn1"]["var"])


def test_round_trip_keeps_every_bit(small, tmp_path):
    _, variables, arrays = small
    arrays = {**arrays, "bn1.num_batches_tracked": np.int64(7)}
    model, loaded = convert.load_cifar_resnet(write(tmp_path / "a.npz", arrays))
    assert model.blocks == 1 and model.classes == 3
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_forward_pass_is_that_of_pytorch(small):
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    model, variables, arrays = small
    t = {key: torch.from_numpy(value) for key, value in arrays.items()}

    def conv_bn(x, conv, bn, stride):
        x = F.conv2d(x, t[f"{conv}.weight"], stride=stride, padding=1)
        stats = t[f"{bn}.running_mean"], t[f"{bn}.running_var"]
        return F.batch_norm(x, *stats, t[f"{bn}.weight"], t[f"{bn}.bias"], eps=1e-5)

    images = np.random.default_rng(1).standard_normal((2, 32, 32, 3), dtype=np.float32)
    y = F.relu(conv_bn(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), "conv1", "bn1", 1))
    for name, stride in (("layer1.0", 1), ("layer2.0", 2), ("layer3.0", 2)):
        z = F.relu(conv_bn(y, f"{name}.conv1", f"{name}.bn1", stride))
        z = conv_bn(z, f"{name}.conv2", f"{name}.bn2", 1)
        side = (z.shape[1] - y.shape[1]) // 2
        y = F.relu(z + F.pad(y[:, :, ::stride, ::stride], (0, 0, 0, 0, side, side)))
    want = F.linear(y.mean((2, 3)), t["linear.weight"], t["linear.bias"]).numpy()
    np.testing.assert_allclose(model.apply(variables, jnp.asarray(images)), want, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("layer3.0.conv2.weight"), "missing: layer3.0.conv2.weight"),
        (lambda a: a.update({"layer4.0.conv1.weight": np.zeros(3, np.float32)}), "not expected: layer4.0.conv1.weight"),
        (lambda a: a.update({"conv1.weight": a["conv1.weight"].T}), r"conv1.weight \(params/conv1/kernel\) has shape"),
        (lambda a: a.update({"bn1.bias": a["bn1.bias"].astype(np.float64)}), "bn1.bias .* float64, expected float32"),
        (lambda a: a.update({"bn1.bias": a["bn1.bias"] * np.float32(np.nan)}), "bn1.bias .* not finite"),
        (lambda a: a.pop("linear.bias"), "needs layer1.* entries and a vector linear.bias"),
    ],
)
def test_wrong_entries_are_named(small, tmp_path, change, message):
    arrays = dict(small[2])
    change(arrays)
    path = write(tmp_path / "wrong.npz", arrays)
    with pytest.raises(convert.CheckpointError, match=message) as caught:
        convert.load_cifar_resnet(path)
    assert str(path) in str(caught.value)


def test_hostile_files(small, tmp_path):
    good = write(tmp_path / "good.npz", small[2]).read_bytes()
    middle = len(good) // 2
    files = {
        "empty.npz": b"",
        "text.npz": b"not a checkpoint",
        "cut.npz": good[:middle],
        "flipped.npz": good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(convert.CheckpointError, match=name):
            convert.load_cifar_resnet(tmp_path / name)


def test_pickles_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "pickle.npz"
    np.savez(path, **{"conv1.weight": np.array([Bomb()], dtype=object)})
    with pytest.raises(convert.CheckpointError, match="pickle"):
        convert.read_npz(path)
    assert not (tmp_path / "ran").exists()


def test_entries_that_are_not_numbers_are_refused(tmp_path):
    path = write(tmp_path / "strings.npz", {"name": np.array(["resnet"])})
    with pytest.raises(convert.CheckpointError, match="entry 'name' holds <U6"):
        convert.read_npz(path)
    with zipfile.ZipFile(tmp_path / "raw.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(convert.CheckpointError, match="'readme.txt' holds raw bytes"):
        convert.read_npz(tmp_path / "raw.npz")


def test_too_large_is_refused_before_unpacking(tmp_path, monkeypatch):
    path = write(tmp_path / "big.npz", {"a": np.zeros(1000, np.float32)})
    monkeypatch.setattr(convert, "_MAX_BYTES", 2000)
    with pytest.raises(convert.CheckpointError, match="unpacks to 4128 bytes"):
        convert.read_npz(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        convert.load_cifar_resnet(tmp_path / "none.npz")


@pytest.mark.parametrize("depth", some([20], [20, 32, 56]))
def test_published_checkpoints_label_the_78_lossless_images(depth):
    root = folder()
    with np.load(root / "cifar10_subset" / "lossless_78.npz") as images:
        x, y = images["x"], images["y"]
    model, variables = convert.load_cifar_resnet(root / "checkpoints" / f"resnet{depth}_cifar10.npz")
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    x = (x.transpose(0, 2, 3, 1).astype(np.float32) / np.float32(255) - mean[None, None, None]) / std[None, None, None]
    logits = jax.jit(model.apply)(variables, jnp.asarray(x))
    assert int((np.asarray(logits).argmax(-1) == y).sum()) == 78


def test_published_checkpoints_round_trip():
    path = folder() / "checkpoints" / "resnet20_cifar10.npz"
    arrays = convert.read_npz(path)
    back = convert.to_torch(convert.load_cifar_resnet(path)[1])
    assert set(arrays) == set(back)
    for key, array in arrays.items():
        np.testing.assert_array_equal(back[key], array)
