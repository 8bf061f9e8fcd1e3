"""Augmentation against NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.data import augment


def pictures(n: int = 40, h: int = 6, w: int = 7, c: int = 2, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 255, (n, h, w, c)).astype(dtype)


@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_each_shifted_image_is_one_of_the_possible_crops(mode: str, dtype: type) -> None:
    images, pixels = pictures(dtype=dtype), 2
    out = np.asarray(jax.jit(augment.random_shift(pixels, mode))(jax.random.key(1), images))
    assert out.dtype == dtype and out.shape == images.shape
    margin = ((pixels, pixels), (pixels, pixels), (0, 0))
    offsets = []
    for image, moved in zip(images, out, strict=True):
        padded = np.pad(image, margin, mode="constant" if mode == "zero" else "reflect")
        matches = [
            (i, j)
            for i in range(2 * pixels + 1)
            for j in range(2 * pixels + 1)
            if np.array_equal(padded[i : i + 6, j : j + 7], moved)
        ]
        assert len(matches) == 1
        offsets += matches
    assert {i for i, _ in offsets} == set(range(5))  # 40 draws miss one of 5 with probability 7e-4; the key is fixed
    assert {j for _, j in offsets} == set(range(5))


def test_offsets_are_uniform() -> None:
    images = jnp.zeros((5000, 3, 3, 1), jnp.uint8).at[:, 1, 1, 0].set(1)
    out = np.asarray(augment.random_shift(1)(jax.random.key(0), images))[..., 0]
    share = out.mean(axis=0)
    assert np.allclose(share, 1 / 9, atol=5 * np.sqrt(1 / 9 * 8 / 9 / 5000))


def test_no_shift_is_the_identity() -> None:
    images = pictures()
    assert np.array_equal(augment.random_shift(0)(jax.random.key(0), jnp.asarray(images)), images)


def test_each_flipped_image_is_itself_or_its_mirror() -> None:
    images = pictures(400)
    out = np.asarray(jax.jit(augment.random_flip())(jax.random.key(2), images))
    mirrored = np.array([np.array_equal(o, i[:, ::-1]) for i, o in zip(images, out, strict=True)])
    kept = np.array([np.array_equal(o, i) for i, o in zip(images, out, strict=True)])
    assert (mirrored ^ kept).all()
    assert 150 < mirrored.sum() < 250


@pytest.mark.parametrize(("probability", "flipped"), [(0.0, False), (1.0, True)])
def test_flips_at_the_ends_are_certain(probability: float, flipped: bool) -> None:
    images = pictures()
    out = augment.random_flip(probability)(jax.random.key(0), jnp.asarray(images))
    assert np.array_equal(out, images[:, :, ::-1] if flipped else images)


def test_compose_gives_each_step_its_own_key() -> None:
    images = jnp.asarray(pictures())
    key = jax.random.key(7)
    shift, flip = augment.random_shift(1), augment.random_flip()
    expected = flip(jax.random.fold_in(key, 1), shift(jax.random.fold_in(key, 0), images))
    assert np.array_equal(jax.jit(augment.compose(shift, flip))(key, images), expected)
    assert np.array_equal(augment.compose()(key, images), images)


def test_the_same_key_gives_the_same_images_inside_a_scan() -> None:
    images = jnp.asarray(pictures())
    keys = jax.random.split(jax.random.key(3), 3)
    step = augment.compose(augment.random_shift(2, "reflect"), augment.random_flip())
    _, scanned = jax.lax.scan(lambda carry, key: (carry, step(key, images)), 0, keys)
    for key, out in zip(keys, scanned, strict=True):
        assert np.array_equal(step(key, images), out)


def test_normalise_is_the_formula() -> None:
    images, mean, std = pictures(c=3), (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    out = jax.jit(lambda x: augment.normalise(x, mean, std))(images)
    assert out.dtype == jnp.float32
    assert np.allclose(out, (images / 255.0 - np.array(mean)) / np.array(std), rtol=1e-6, atol=1e-6)


def test_bad_arguments_are_named() -> None:
    images = jnp.asarray(pictures())
    with pytest.raises(ValueError, match="pixels .* -1"):
        augment.random_shift(-1)
    with pytest.raises(ValueError, match="mode .* 'wrap'"):
        augment.random_shift(1, "wrap")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="larger images than 6x7"):
        augment.random_shift(6, "reflect")(jax.random.key(0), images)
    with pytest.raises(ValueError, match=r"probability .* 1\.5"):
        augment.random_flip(1.5)
    with pytest.raises(ValueError, match="must be uint8, got float32"):
        augment.normalise(images.astype(jnp.float32), (0, 0), (1, 1))
    with pytest.raises(ValueError, match="need 2 values"):
        augment.normalise(images, (0.5,), (1.0,))
    with pytest.raises(ValueError, match="std positive"):
        augment.normalise(images, (0.5, 0.5), (1.0, 0.0))
