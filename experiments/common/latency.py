"""What one image or one word takes: the dense network, and the compressed one by the kernels of its storage formats.

All are measured in turn, so that other work on the machine meets them alike. Where the kernels do not run, the reason
stands in place of figures: on the fallback a compressed network is the dense one with zeros.
"""

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compressx import formats, kernels
from compressx.formats import Packed
from compressx.timing import interleaved
from compressx.tree import paths
from experiments.common import models
from experiments.common.models.lstm import LanguageModel

WORDS = 64  # of a call, one after the other: the call's own overhead is spread over them
NO_KERNELS = "the kernels do not run here: no compiler, turned off, or not on the CPU"


def of_images(
    saved: formats.SavedModel, dense: Any, shape: tuple[int, ...], classes: int, budget: float = 0.5
) -> tuple[dict[str, float] | None, dict[str, Any]]:
    """Median milliseconds of one image, batch 1, on all cores that the process may use.

    Args:
      saved: the compressed network, with its name.
      dense: variables of the dense one.
      shape: of an image, `[rows, columns, channels]`.
      classes: that the network tells apart.
      budget: seconds to measure for; at least 5 rounds.

    Returns:
      The `latency_ms` section of a summary, None where the kernels do not run; and the facts: path, rounds, and the
      quartiles of each, or the reason.
    """
    if saved.model is None or len(shape) != 3:
        return None, {"reason": "no network of images is named in the file"}
    x = np.zeros((1, *shape), np.float32)
    options = {**saved.model.get("options", {}), "classes": classes}
    try:
        model = models.build(saved.model["name"], **options)
        compressed = kernels.compile(model, saved)
        if compressed.path == "xla":
            return None, {"reason": NO_KERNELS}
        if not any(line.on == compressed.path for line in compressed.layers(x)):
            return None, {"reason": "the network has no convolution that the kernels run"}
        runs = {"dense": kernels.compile(model, dense, path="xla"), "compressed": compressed}
        taken = interleaved({name: partial(run, x) for name, run in runs.items()}, seconds=budget)
    except (ValueError, TypeError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        # a finished training is not lost for this
        return None, {"reason": f"{type(error).__name__}: {str(error)[:200]}"}
    medians, facts = _quartiles(taken)
    return medians, {"path": compressed.path, "rounds": len(taken["dense"]), **facts}


def of_layer(budget: float = 0.5) -> dict[str, Any]:
    """A layer of VGG-16's size, dense and compressed, timed here: what a small network is too small to show.

    The layer is the 3x3 convolution of 256 channels on 56x56 with random weights: of every kernel that stays four taps
    in one of eight patterns, and 1 of 3.6 kernels, 8.1 times fewer weights.

    Args:
      budget: seconds to measure for; at least 5 rounds.

    Returns:
      `dense` and `compressed`, median milliseconds of one image; or `reason` where the kernels do not run.
    """
    if not kernels.available():
        return {"reason": NO_KERNELS}
    rng, side, channels = np.random.default_rng(0), 56, 256
    masks = np.zeros((8, 9), np.float32)
    for mask in masks:
        mask[[4, *rng.choice([0, 1, 2, 3, 5, 6, 7, 8], 3, replace=False)]] = 1
    taken_masks = masks[rng.integers(0, 8, (channels, channels))] * (rng.random((channels, channels, 1)) < 2.25 / 8.1)
    w = rng.normal(size=(3, 3, channels, channels)).astype(np.float32)
    sparse = w * taken_masks.transpose(2, 0, 1).reshape(w.shape)
    x = jnp.asarray(rng.normal(size=(1, side, side, channels)), jnp.float32)
    compressed = kernels.prepare(sparse, (1, side, side, channels))
    dense = jax.jit(
        lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )
    kernel = jnp.asarray(w)
    medians, _ = _quartiles(
        interleaved({"dense": lambda: dense(x, kernel), "compressed": lambda: compressed(x)}, seconds=budget)
    )
    return medians


def of_words(
    model: LanguageModel, dense: Any, stored: Mapping[str, Mapping[str, Packed]], budget: float = 0.5
) -> tuple[dict[str, float] | None, dict[str, Any]]:
    """Median milliseconds of one word of a language model, batch 1: its vector in, all LSTM layers, its logits out.

    Words come one after the other, the state carried on, `WORDS` in one compiled loop. The dense network is measured as
    `models.lstm` on XLA ("dense_xla") and by the kernels' dense tiles ("dense_kernels"); "dense" is the faster one.

    Args:
      model: the network.
      dense: its dense variables.
      stored: compressed networks by name: packed leaves by path, as `formats.load_model` gives them.
      budget: seconds to measure for; at least 5 rounds.

    Returns:
      Medians of "dense" and of every name, None where the kernels do not run; and the facts: path, rounds, words a call
      and the quartiles of each, or the reason.
    """
    if not kernels.recurrent.available():
        return None, {"reason": NO_KERNELS}
    leaves = dict(zip(paths(dense), jax.tree.leaves(dense), strict=True))
    steps = {"dense_xla": _xla_step(model, dense)}
    for name, network in {"dense_kernels": leaves, **stored}.items():
        steps[name] = packed_step(network, model.layers)
    runs = {name: _read(step, model.begin(1)) for name, step in steps.items()}
    words = jnp.arange(WORDS, dtype=jnp.int32) % model.classes
    calls = {name: partial(run, words) for name, run in runs.items()}
    taken = {name: [t / WORDS for t in times] for name, times in interleaved(calls, seconds=budget).items()}
    medians, facts = _quartiles(taken)
    medians["dense"] = min(medians.pop("dense_xla"), medians.pop("dense_kernels"))
    path = f"native/{kernels.native.isa()}"
    return medians, {"path": path, "words": WORDS, "rounds": len(taken["dense_xla"]), **facts}


Step = Callable[[Any, Any], tuple[Any, Any]]  # (word, carry) -> (logits [V], carry)


def packed_step(network: Mapping[str, Any], layers: int) -> Step:
    """A word of `models.lstm.LanguageModel` by the kernels, from its leaves by path, packed or plain."""

    def leaf(name: str) -> Any:
        w = network[f"params/{name}"]
        return jnp.asarray(formats.unpack(w) if isinstance(w, Packed) else w)

    def matrix(name: str) -> Any:
        w = network[f"params/{name}/kernel"]
        return w if isinstance(w, Packed) else np.asarray(w)

    table, head, shift = leaf("embedding/embedding"), kernels.prepare_product(matrix("softmax")), leaf("softmax/bias")
    cells = [
        (
            kernels.prepare_product(matrix(f"lstm_{i}/input")),
            kernels.prepare_recurrent("lstm", [matrix(f"lstm_{i}/recurrent")]),
            leaf(f"lstm_{i}/bias"),
        )
        for i in range(layers)
    ]

    def step(word: Any, carry: Any) -> tuple[Any, Any]:
        x, new = table[word][None], []
        for (product, cell, bias), (h, c) in zip(cells, carry, strict=True):
            y, c = cell((product(x) + bias[None])[None], h, c)
            x = y[0]
            new.append((x, c))
        return (head(x) + shift[None])[0], tuple(new)

    return step


def _xla_step(model: LanguageModel, variables: Any) -> Step:
    def step(word: Any, carry: Any) -> tuple[Any, Any]:
        logits, carry = model.apply(variables, word[None, None], carry)
        return logits[0, 0], carry

    return step


def _read(step: Step, carry: Any) -> Callable[[Any], Any]:
    """Words `[n]` one after the other: the logits of all."""

    def one(carry: Any, word: Any) -> tuple[Any, Any]:
        logits, carry = step(word, carry)
        return carry, logits

    return jax.jit(lambda words: lax.scan(one, carry, words)[1])


def _quartiles(taken: Mapping[str, list[float]]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Medians in milliseconds by name, and quartiles by `name_ms`; of times in seconds."""
    found = {name: statistics.quantiles([1e3 * s for s in values], n=4) for name, values in taken.items()}
    facts = {f"{name}_ms": {"low": q[0], "median": q[1], "high": q[2]} for name, q in found.items()}
    return {name: q[1] for name, q in found.items()}, facts
