"""Speech as it arrives: features of chunks, a recurrent step at a time with carried state, and what that costs.

A step multiplies with six matrices a layer. How is the one thing that a kernel changes: `WAYS` names the ways, each a
pair of functions. "bspc_native" is that of `compressx.kernels`: all gates in one pass over the stored blocks.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from compressx import kernels
from compressx.formats import Packed, pack, unpack
from experiments.common.models.gru import GATES
from experiments.gru_speech.speech.features import FrontEnd, derivative_filters, static_features

# -- ways to make a layer's step from its stored matrices: the place where kernels plug in -----------------------------


class Way(NamedTuple):
    """A way to make a step of a layer.

    Attributes:
      prepare: `prepare(leaves) -> tree of arrays`, once, on the host; leaves are the layer's, packed, by name.
      step: `step(tree, x [n, in], h [n, hidden], reset) -> h [n, hidden]`, under jit.
    """

    prepare: Callable[[Mapping[str, Packed]], Any]
    step: Callable[[Any, Array, Array, str], Array]


def bspc_blocks(packed: Packed) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The blocks of a BSPC matrix: inputs `[c]`, outputs `[r]` and weights `[c, r]` of each.

    Raises:
      ValueError: another format.
      CompressedFileError: the arrays are inconsistent.
    """
    if packed.format not in kernels.recurrent.BSPC:
        raise ValueError(f"the format is {packed.format!r}; bspc is needed")
    return [
        (inputs.astype(np.int32), outputs.astype(np.int32), np.ascontiguousarray(weight.T))
        for outputs, inputs, weight in kernels.recurrent.blocks_of(packed)
    ]


def _gathered(blocks: Any, x: Array, outputs: int) -> Array:
    """Every block gathers its inputs once, multiplies densely, and adds to its outputs."""
    y = jnp.zeros((x.shape[0], outputs), x.dtype)
    for inputs, targets, weight in blocks:
        y = y.at[:, targets].add(x[:, inputs] @ weight, unique_indices=True)
    return y


def _by_matrix(unpacked: Callable[[Packed], Any], multiply: Callable[[Any, Array, int], Array]) -> Way:
    """The step written out over the six matrices, each multiplied by itself."""

    def prepare(leaves: Mapping[str, Packed]) -> Any:
        return {n: unpacked(p) if n in MATRICES else unpack(p) for n, p in leaves.items()}

    def step(layer: Any, x: Array, h: Array, reset: str) -> Array:
        m = h.shape[-1]
        of = {g: multiply(layer[f"w{g}"], x, m) + layer[f"b{g}"][None] for g in GATES}
        z, r = (jax.nn.sigmoid(of[g] + multiply(layer[f"u{g}"], h, m)) for g in "zr")
        if reset == "before":
            c = jnp.tanh(of["h"] + multiply(layer["uh"], r * h, m))
        else:
            c = jnp.tanh(of["h"] + r * (multiply(layer["uh"], h, m) + layer["bu"][None]))
        return z * h + (1 - z) * c

    return Way(prepare, step)


def _prepare_native(leaves: Mapping[str, Packed]) -> Any:
    lanes = kernels.native.LANES[kernels.native.isa()]
    w, u = ([leaves[f"{kind}{g}"] for g in GATES] for kind in "wu")
    reset = "after" if "bu" in leaves else "before"
    return {
        "w": kernels.recurrent.tiles_of(w, lanes),
        "u": kernels.recurrent.cell_tiles(f"gru_{reset}", u, lanes),
        "bias": np.concatenate([unpack(leaves[f"b{g}"]) for g in GATES]),
        **({"bu": unpack(leaves["bu"])} if "bu" in leaves else {}),
    }


def _step_native(layer: Any, x: Array, h: Array, reset: str) -> Array:
    if ("bu" in layer) != (reset == "after"):
        raise ValueError(f"reset={reset!r} is impossible: the stored network has it the other way round")
    isa = kernels.native.isa()
    a = kernels.recurrent.native_product(layer["w"], x, 3 * h.shape[-1], isa) + layer["bias"][None]
    bias = layer["bu"] if reset == "after" else jnp.zeros(h.shape[-1], h.dtype)
    return kernels.recurrent.native_cell(f"gru_{reset}", layer["u"], a[None], h, jnp.zeros_like(h), bias, isa)[1]


MATRICES = tuple(f"{kind}{g}" for kind in "wu" for g in GATES)
WAYS: dict[str, Way] = {
    "dense": _by_matrix(unpack, lambda w, x, outputs: x @ w),
    "bspc_xla": _by_matrix(bspc_blocks, _gathered),
    "bspc_native": Way(_prepare_native, _step_native),
}


def ways() -> tuple[str, ...]:
    """Those that run here, the fastest last: the native one needs a CPU and a compiler."""
    return tuple(name for name in WAYS if name != "bspc_native" or kernels.recurrent.available())


# -- the network, a step at a time -------------------------------------------------------------------------------------


class Network(NamedTuple):
    """A stored GRU ready to step.

    Attributes:
      layers: each as its way has prepared it.
      kernel: of the output layer, `[hidden, outputs]`.
      bias: of the output layer.
    """

    layers: tuple[dict[str, Any], ...]
    kernel: Array
    bias: Array


def prepare(packed: Mapping[str, Packed], way: str, hidden_layers: int) -> Network:
    """A network from its packed leaves by path, as `formats.load_model` gives them, for one of `WAYS`.

    All ways but "dense" take matrices of any format: those that are not BSPC yet are packed so.
    """

    def blocks(name: str, p: Packed) -> Packed:
        if way == "dense" or name not in MATRICES or p.format in kernels.recurrent.BSPC:
            return p
        return pack(unpack(p), format="bspc")

    layers = []
    for i in range(hidden_layers):
        prefix = f"params/gru_{i}/"
        leaves = {name.removeprefix(prefix): p for name, p in packed.items() if name.startswith(prefix)}
        layers.append(WAYS[way].prepare({n: blocks(n, p) for n, p in leaves.items()}))
    kernel, bias = (jnp.asarray(unpack(packed[f"params/output/{n}"])) for n in ("kernel", "bias"))
    return Network(tuple(jax.tree.map(jnp.asarray, layers)), kernel, bias)


def make_step(way: str, reset: str = "before") -> Callable[[Network, Array, Array], tuple[Array, Array]]:
    """`step(network, state [layers, n, hidden], x [n, features]) -> (logits [n, outputs], state)`, pure, not jitted.

    The same function as `models.gru.GRU.stream` of one frame.
    """

    def step(network: Network, state: Array, x: Array) -> tuple[Array, Array]:
        new = []
        for layer, h in zip(network.layers, state, strict=True):
            x = WAYS[way].step(layer, x, h, reset)
            new.append(x)
        return x @ network.kernel + network.bias[None], jnp.stack(new)

    return step


def run_steps(step: Callable[..., Any], network: Network, state: Array, x: Array) -> tuple[Array, Array]:
    """A chunk of frames `[n, t, features]` step by step: logits `[n, t, outputs]` and the state after it (pure)."""

    def one(state: Array, x: Array) -> tuple[Array, Array]:
        logits, state = step(network, state, x)
        return state, logits

    state, logits = jax.lax.scan(one, state, jnp.swapaxes(x, 0, 1))
    return jnp.swapaxes(logits, 0, 1), state


# -- features of chunks ------------------------------------------------------------------------------------------------


class FrontState(NamedTuple):
    """What the front end keeps between chunks.

    Attributes:
      samples: float32, sound from the first sample of the next frame on.
      static: float32 `[k, c]`, static features that derivatives still need.
      first: the number of the first of them.
      done: frames given out.
    """

    samples: np.ndarray
    static: np.ndarray
    first: int
    done: int


def start(front: FrontEnd) -> FrontState:
    """Before any sound."""
    return FrontState(np.zeros(0, np.float32), np.zeros((0, front.static), np.float32), 0, 0)


_static = jax.jit(static_features, static_argnums=(1, 2))


def push(
    state: FrontState, samples: np.ndarray, rate: int, front: FrontEnd, end: bool = False
) -> tuple[np.ndarray, FrontState]:
    """The features that a chunk of sound completes, `[k, front.size]`, and the state after it.

    A frame is complete `front.context` frames after its own last sample, for its derivatives look ahead; `end` says
    that no more sound comes, and completes all. Chunk by chunk or as a whole, the features are the same to rounding.
    """
    sound = np.concatenate([state.samples, np.asarray(samples, np.float32)])
    fresh = front.frames(len(sound), rate)
    static = state.static
    if fresh:
        window, hop = front.samples(rate)
        used = sound[: (fresh - 1) * hop + window]
        static = np.concatenate([static, np.asarray(_static(jnp.asarray(used), rate, front))])
        sound = sound[fresh * hop :]
    known = state.first + len(static)
    ready = known if end else max(known - front.context, state.done)
    if not len(static) or ready == state.done:
        return np.zeros((0, front.size), np.float32), FrontState(sound, static, state.first, state.done)
    filters = derivative_filters(front.derivatives)
    at = np.arange(state.done, ready)[:, None] + np.arange(-front.context, front.context + 1)[None]
    around = static[np.clip(at, 0, known - 1) - state.first]
    out = np.einsum("tkc,dk->tdc", around, filters).reshape(ready - state.done, -1)
    first = max(state.first, ready - front.context)
    return out, FrontState(sound, static[first - state.first :], first, ready)


# -- what a step costs -------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What one time step of a stored network does.

    Attributes:
      multiply_adds: products with non-zero weights, biases and gates not counted.
      weight_bytes: stored bytes that it reads, indices included.
    """

    multiply_adds: int
    weight_bytes: int


def work(packed: Mapping[str, Packed]) -> Work:
    """Of all leaves of a stored network; the dense one's is `work` of it stored dense."""
    adds = sum(int(np.count_nonzero(unpack(p))) for p in packed.values() if len(p.shape) == 2)
    return Work(adds, sum(a.nbytes for p in packed.values() for a in p.arrays.values()))


# 45 nm, 0.9 V. Source: M. Horowitz, "Computing's Energy Problem (and What We Can Do about It)", ISSCC 2014.
PICOJOULES = {"multiply_add_fp32": 4.6, "dram_byte": 160.0, "sram_byte": 1.25}


def energy_uj(done: Work, memory: str = "dram") -> float:
    """An estimate of a step's energy in microjoules: arithmetic, and reading every stored byte once.

        (4.6 pJ * multiply-adds + e * bytes),   e = 160 pJ (DRAM) or 1.25 pJ (32 KB SRAM) a byte

    Not a measurement: no activations, no control, no leakage, and a technology that is not the reader's.
    """
    if memory not in ("dram", "sram"):
        raise ValueError(f'memory={memory!r} is impossible; it must be "dram" or "sram"')
    each = PICOJOULES[f"{memory}_byte"]
    return (PICOJOULES["multiply_add_fp32"] * done.multiply_adds + each * done.weight_bytes) * 1e-6


class Timing(NamedTuple):
    """Milliseconds: the median, and the quartiles."""

    median: float
    low: float
    high: float


def quartiles(seconds: Sequence[float]) -> Timing:
    """The median and the quartiles of measured seconds, in milliseconds."""
    times = [1e3 * s for s in seconds]
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return Timing(middle, low, high)


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def real_time(
    network: Network,
    step: Callable[..., Any],
    samples: np.ndarray,
    rate: int,
    front: FrontEnd,
    state: Array,
    chunk: float = 0.1,
    rounds: int = 5,
) -> dict[str, float]:
    """Streaming from sound to logits, in chunks, beside the length of the sound: medians over rounds.

    Args:
      network: from `prepare`.
      step: from `make_step`.
      samples: a recording.
      rate: its samples a second.
      front: the front end; its features are used as they are.
      state: the network's first state, `[layers, 1, hidden]`.
      chunk: seconds a chunk.
      rounds: how often it is done.

    Returns:
      `factor`, seconds of sound a second of work (above 1 is faster than real time), `network_factor` without the front
      end, `seconds` of sound, `cores` that the process may use, and `delay_ms` from a sound's end to its output's
      earliest time: window, look-ahead and chunk.
    """
    size = round(chunk * rate)
    run = jax.jit(lambda network, state, x: run_steps(step, network, state, x))

    def once() -> tuple[float, float]:
        heard, h, spent = start(front), state, 0.0
        began = time.perf_counter()
        for at in range(0, len(samples), size):
            frames, heard = push(heard, samples[at : at + size], rate, front, end=at + size >= len(samples))
            if len(frames):
                before = time.perf_counter()
                _, h = run(network, h, jnp.asarray(frames[None]))
                h.block_until_ready()
                spent += time.perf_counter() - before
        return time.perf_counter() - began, spent

    once()
    whole, inner = zip(*(once() for _ in range(rounds)), strict=True)
    seconds = len(samples) / rate
    return {
        "factor": seconds / statistics.median(whole),
        "network_factor": seconds / statistics.median(inner),
        "seconds": seconds,
        "cores": cores(),
        "delay_ms": 1e3 * (front.window + front.context * front.hop + chunk),
    }
