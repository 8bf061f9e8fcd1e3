"""Other people's networks through the whole path: ADMM, hardening, retraining, a file, and back into their own objects.

Tiny configurations with random weights. `make test-zoos` makes an environment that has the packages; anywhere else a
test whose package is missing is skipped, and under `make test-zoos` it fails.
"""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import compressx
from compressx.tree import paths

pytestmark = [
    pytest.mark.slow,
    # what other packages warn of is theirs: deprecations, missing accelerators
    pytest.mark.filterwarnings("ignore"),
]
SET = compressx.unstructured(0.25) & compressx.quantize(8)


@pytest.fixture(autouse=True)
def _as_they_run():
    """These packages are written for jax's own defaults, and the suite is stricter."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def package(name: str) -> Any:
    """A module, or the test is skipped where nobody has asked for its package."""
    if os.environ.get("COMPRESSX_ZOOS"):
        return importlib.import_module(name)
    return pytest.importorskip(name)


def rules_for(params: Any) -> list[tuple[str, Any]]:
    """Every leaf of two axes or more that are longer than 1."""
    wide = [p for p, x in zip(paths(params), jax.tree.leaves(params), strict=True) if _wide(x)]
    return [("|".join(map(_escaped, wide)), SET)]


def _wide(x: Any) -> bool:
    return sum(n > 1 for n in x.shape) > 1


def _escaped(path: str) -> str:
    return "".join(c if c.isalnum() or c in "/_" else f"\\{c}" for c in path)


def _steps(tx: Any, loss: Callable[[Any], jax.Array], params: Any, n: int) -> tuple[Any, Any]:
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(n):
        params, state = step(params, state)
    return params, state


def through_the_path(
    params: Any, forward: Callable[[Any], jax.Array], own: Callable[[Any], Any], file: Path
) -> compressx.Hardened:
    """Compresses a network, stores it, and compares what its own library computes from the leaves of the file.

    Args:
      params: the tree that the library's user trains.
      forward: `forward(params) -> outputs`, pure.
      own: `own(params) -> outputs`, with the leaves put into the library's object as its user does.
      file: where it is stored.
    """
    rules = rules_for(params)
    loss = lambda p: jnp.mean(jnp.square(forward(p) - 1.0))
    tx = optax.chain(compressx.admm(rules, rho=1e-3, every=1), optax.adam(1e-3))
    trained, state = _steps(tx, loss, params, 2)
    hard = compressx.harden(trained, rules, state)
    tx = optax.chain(optax.adam(1e-3), compressx.retrain(rules, hard))
    tuned, state = _steps(tx, loss, hard.params, 2)
    hard = compressx.retract(tuned, rules, state)
    compressx.check(hard, rules)
    compressx.save_model(file, hard, rules)
    saved = compressx.load_model(file, like=hard.params)
    compressx.check(saved, saved.rules)
    for path, a, b in zip(paths(params), jax.tree.leaves(hard.params), jax.tree.leaves(saved.params), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b), path
        if _wide(a):  # floor(n / 4 + 1/2) weights stay, of those that are not zero
            assert 0 < int((np.asarray(b) != 0).sum()) <= int(b.size / 4 + 0.5), path
    want, got = np.asarray(own(hard.params)), np.asarray(own(saved.params))
    assert np.isfinite(want).all() and np.ptp(want) > 0
    np.testing.assert_array_equal(got, want)
    assert not np.array_equal(np.asarray(own(params)), want)  # the leaves do matter to the library's object
    return hard


IDS = np.arange(10).reshape(2, 5) % 7
IMAGES = np.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=np.float32)


def test_transformers_gpt2(tmp_path: Path) -> None:
    t = package("transformers")
    config = t.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = t.FlaxGPT2LMHeadModel(config, seed=0)

    def own(params: Any) -> Any:
        model.params = params
        return model(IDS).logits

    through_the_path(model.params, lambda p: model(IDS, params=p).logits, own, tmp_path / "m.safetensors")


def test_transformers_vit(tmp_path: Path) -> None:
    t = package("transformers")
    config = t.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=32,
        patch_size=16,
        num_labels=3,
    )
    model = t.FlaxViTForImageClassification(config, seed=0)
    x = IMAGES.reshape(2, 3, 32, 32)

    def own(params: Any) -> Any:
        model.params = params
        return model(x).logits

    through_the_path(model.params, lambda p: model(x, params=p).logits, own, tmp_path / "m.safetensors")


def test_transformers_resnet(tmp_path: Path) -> None:
    t = package("transformers")
    config = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    model = t.FlaxResNetForImageClassification(config, input_shape=(1, 32, 32, 3), seed=0)
    x, held = IMAGES.reshape(2, 3, 32, 32), dict(model.params)

    def forward(params: Any) -> jax.Array:
        return model(x, params={**held, "params": params}, train=False).logits

    def own(params: Any) -> Any:
        model.params = {**held, "params": params}
        return model(x, train=False).logits

    through_the_path(held["params"], forward, own, tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["ResNet", "MobileNetV1"])
def test_haiku(name: str, tmp_path: Path) -> None:
    hk = package("haiku")
    x = IMAGES.reshape(2, 32, 32, 3)
    groups = {"blocks_per_group": (1, 1, 1, 1), "channels_per_group": (8, 8, 8, 8), "bottleneck": False}
    small: dict[str, Any] = {"ResNet": groups, "MobileNetV1": {"channels": (8,) * 13}}[name]
    net = hk.transform_with_state(lambda x, train: getattr(hk.nets, name)(num_classes=3, **small)(x, is_training=train))
    params, state = jax.jit(net.init, static_argnums=2)(jax.random.key(0), x, True)
    forward = lambda p: net.apply(p, state, None, x, False)[0]
    # heads start at zero: a few steps move them
    through_the_path(params, forward, jax.jit(forward), tmp_path / "m.safetensors")


def test_keras_mobilenet_v2(tmp_path: Path) -> None:
    os.environ["KERAS_BACKEND"] = "jax"
    keras = package("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("keras was imported with another backend")
    model = keras.applications.MobileNetV2(input_shape=(32, 32, 3), alpha=0.35, weights=None, classes=3)
    x = IMAGES.reshape(2, 32, 32, 3)
    params = [v.value for v in model.trainable_variables]
    others = [v.value for v in model.non_trainable_variables]

    def own(params: Any) -> Any:
        for variable, value in zip(model.trainable_variables, params, strict=True):
            variable.assign(value)
        return model.predict(x, verbose=0)

    forward = lambda p: model.stateless_call(p, others, x, training=False)[0]
    through_the_path(params, forward, own, tmp_path / "m.safetensors")


def test_equinox_mlp(tmp_path: Path) -> None:
    eqx = package("equinox")
    model = eqx.nn.MLP(5, 3, 16, 2, key=jax.random.key(0))
    params, rest = eqx.partition(model, eqx.is_array)
    x = IMAGES[:10].reshape(2, 5)
    forward = lambda p: jax.vmap(eqx.combine(p, rest))(x)
    through_the_path(params, forward, jax.jit(forward), tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_tunix_decoders_in_their_trainer(name: str, tmp_path: Path) -> None:
    module = package(f"tunix.models.{name}.model")
    trainer = package("tunix.sft.peft_trainer")
    sizes = {"num_layers": 2, "embed_dim": 16, "hidden_dim": 24, "num_heads": 2, "head_dim": 8, "num_kv_heads": 1}
    model = _decoder(module, name, sizes)
    rules = rules_for(nnx.state(model, nnx.Param))
    tx = optax.chain(compressx.admm(rules, rho=1e-3, every=1), optax.adam(1e-3))
    own = _train(trainer, model, tx, tmp_path / "first")
    hard = compressx.harden(nnx.state(model, nnx.Param), rules, own.optimizer.opt_state)
    nnx.update(model, hard.params)
    own = _train(trainer, model, optax.chain(optax.adam(1e-3), compressx.retrain(rules, hard)), tmp_path / "second")
    hard = compressx.retract(nnx.state(model, nnx.Param), rules, own.optimizer.opt_state)
    compressx.check(hard, rules)
    compressx.save_model(tmp_path / "m.safetensors", hard, rules)
    nnx.update(model, hard.params)
    want = np.asarray(_logits(model))
    other = _decoder(module, name, sizes)
    saved = compressx.load_model(tmp_path / "m.safetensors", like=nnx.state(other, nnx.Param))
    nnx.update(other, saved.params)
    np.testing.assert_array_equal(np.asarray(_logits(other)), want)
    assert np.ptp(want) > 0


def _decoder(module: Any, name: str, sizes: dict[str, int]) -> Any:
    more: dict[str, Any] = {"vocab_size": 32} if name == "llama3" else {"num_embed": 32, "sliding_window_size": 4}
    if name == "llama3":
        return module.Llama3(
            module.ModelConfig(**sizes, **more, rope_theta=10_000, norm_eps=1e-5, weight_tying=False), rngs=nnx.Rngs(0)
        )
    return module.Gemma3(module.ModelConfig(**sizes, **more), rngs=nnx.Rngs(0))


def _inputs() -> dict[str, jax.Array]:
    tokens = jnp.asarray(IDS, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(5)[None], (2, 5))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((5, 5), bool))[None], (2, 5, 5))
    return {"tokens": tokens, "positions": positions, "mask": mask}


def _logits(model: Any) -> jax.Array:
    x = _inputs()
    return model(x["tokens"], x["positions"], None, x["mask"])[0]


def _train(trainer: Any, model: Any, tx: Any, folder: Path) -> Any:
    config = trainer.TrainingConfig(eval_every_n_steps=100, max_steps=2)
    made = trainer.PeftTrainer(model, tx, config)
    made = made.with_gen_model_input_fn(
        lambda batch: {
            "input_tokens": batch["tokens"],
            "input_mask": jnp.ones_like(batch["tokens"]),
            "positions": batch["positions"],
            "attention_mask": batch["mask"],
        }
    )
    made.train([_inputs()] * 2, skip_jit=False)
    return made
