"""Noise-aware training: every step runs through a freshly drawn engine, forwards and backwards.

The noise is reparameterised: a cell conducts g(c, z), with z drawn and c the level that its weight asks for, and the
gradient passes g. So the penalty that noise which grows with a cell's conductance puts on large weights is learned.
Straight-through are only the roundings: of weights to levels, of inputs, and of sums by the converter (whose own errors
of gain and offset have no gradient).
"""

import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from compressx.crossbar import layers
from compressx.crossbar.arrays import TABLE_ROWS, Programmed, with_cells, worst_limb_cycles
from compressx.crossbar.cells import decode, encode
from compressx.crossbar.design import Design
from compressx.crossbar.mvm import crossbar_matmul
from compressx.crossbar.noise import Variation, perturb
from compressx.crossbar.recurrent import is_recurrent, path_of


class Target(NamedTuple):
    """What a layer is trained for.

    Attributes:
      design: the engine.
      scale: step of the weights, `[]`.
      input_scale: step of the inputs, `[]`.
      rows: order of the rows where signs are polarized (`rows_of`); None: all, in order.

    Example:
      >>> from compressx import crossbar
      >>> target = crossbar.Target(crossbar.isaac(), scale=0.01, input_scale=0.05)
      >>> target.design.name, target.rows
      ('ISAAC', None)
    """

    design: Design
    scale: float
    input_scale: float
    rows: np.ndarray | None = None


def training_hardware(
    targets: Mapping[str, Target], key: Array, variation: Variation | None = None
) -> AbstractContextManager[None]:
    """A context in which the named Dense and Conv layers compute `train_matmul`, each on devices of its own draw.

    Args:
      targets: by module path, as for `layers.hardware`.
      key: of this step; a layer folds its path's checksum in.
      variation: what is drawn; None: ideal devices, so that only the converters' errors are trained for.

    Returns:
      A context manager: calls of the model's `apply` inside it compute the named layers on the simulated engine.

    Raises:
      ValueError: inside the context, where a target names a recurrent layer, a grouped convolution or anything but a
        Dense or Conv layer.

    Example:
      >>> import flax.linen as nn
      >>> from compressx import crossbar
      >>> design = crossbar.Design(rows=2, active_rows=2, weight_bits=4, input_bits=2, signs="polarized")
      >>> params = {"kernel": jnp.full((2, 1), 1.6), "bias": jnp.zeros(1)}
      >>> with crossbar.training_hardware({"": crossbar.Target(design, 0.5, 1.0)}, jax.random.key(0)):
      ...     print(nn.Dense(1).apply({"params": params}, jnp.ones((1, 2))))  # 1.6 is stored as 3 steps of 0.5
      [[3.]]
    """

    calls: Counter[str] = Counter()

    def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        path = "/".join(module.path)
        if context.method_name == "__call__" and is_recurrent(module):
            mine = [p for p in targets if p.startswith(path_of(module, ""))]
            if mine:
                raise ValueError(f"{mine[0]}: recurrent layers cannot be trained through the simulator")
        if context.method_name != "__call__" or path not in targets:
            return next_fun(*args, **kwargs)
        calls[path] += 1
        return _call(module, args[0], path, targets[path], key, variation, calls[path])

    return nn.intercept_methods(intercept)


def _call(
    module: nn.Module, x: Array, path: str, target: Target, key: Array, variation: Variation | None, number: int
) -> Array:
    if isinstance(module, nn.Conv):
        if module.feature_group_count != 1:
            raise ValueError(f"{path}: grouped convolutions cannot be trained through the simulator")
        x = layers.patches(x, *layers.geometry(module, path))
    elif not isinstance(module, nn.Dense):
        raise ValueError(f"{path} is no Dense or Conv layer")
    params = module.variables["params"]
    w = params["kernel"].reshape(-1, params["kernel"].shape[-1])
    flat = x.reshape(-1, x.shape[-1])
    if target.rows is not None:
        flat, w = flat[:, target.rows], w[target.rows]
    own = jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))
    steps = (jnp.asarray(target.scale, jnp.float32), jnp.asarray(target.input_scale, jnp.float32))
    reads = jax.random.fold_in(own, number)  # the same devices in every call, read anew
    y = train_matmul(flat, w, *steps, target.design, own, variation, reads).reshape(*x.shape[:-1], -1)
    return y + params["bias"].reshape((1,) * (y.ndim - 1) + (-1,)) if module.use_bias else y


def train_matmul(
    x: Array,
    w: Array,
    scale: Array,
    input_scale: Array,
    design: Design,
    key: Array | None = None,
    variation: Variation | None = None,
    reads: Array | None = None,
) -> Array:
    """`x @ w` through a freshly drawn engine, for noise-aware training.

        y = engine(x, g(c(w), z)),        dL/dw = dL/dy through x @ w_drawn,   w_drawn = sum_k 2^(b k) g_k

    A level grows with its weight: dc_k/dw = c_k / u, where u is what is stored of w (its magnitude, or w + offset).
    Weights are rounded to integers inside the trace, so nothing is compacted and nothing is proven. Polarized designs
    need weights that are single-signed already, rows in order.

    Args:
      x: float32 `[n, P]`, inputs.
      w: float32 `[P, F]`, weights.
      scale, input_scale: float32 `[]`, steps of the weights and of the inputs.
      design: the engine.
      key, variation: draw of devices; None: ideal ones, whose gradient is that of the plain product.
      reads: key of the read noise; None: `key`.

    Returns:
      float32 `[n, F]`, in units of 1.

    Raises:
      ValueError: a variation is given without a key.

    Source: noise on the weights in the forward pass: V. Joshi et al., "Accurate Deep Neural Network Inference using
    Computational Phase-change Memory", 2020; the gradient through the drawn cell is that of reparameterisation, D.
    P. Kingma, M. Welling, "Auto-Encoding Variational Bayes", 2014, section 2.4.

    Example:
      >>> from compressx import crossbar
      >>> design = crossbar.Design(rows=2, active_rows=2, weight_bits=4, input_bits=2, signs="polarized")
      >>> x, w, one = jnp.array([[1.0, 2.0]]), jnp.array([[3.2], [1.0]]), jnp.float32(1.0)
      >>> float(crossbar.train_matmul(x, w, one, one, design)[0, 0])  # 3.2 is stored as 3
      5.0
    """
    low, high = design.weight_range
    whole = jnp.clip(jnp.round(w / scale), low, high).astype(jnp.int32)
    arrays = _traced(whole, design)
    xs = layers.quantize_inputs(x, input_scale, design)
    effective = (w / scale).astype(jnp.float32)
    if variation is not None:
        if key is None:
            raise ValueError("a variation needs a key")
        arrays = perturb(key, _growing(arrays, whole, effective), variation)
        nothing = whole + _offset(design) == 0  # no cell conducts, and none grows: as without devices
        effective = decode(arrays.cells, design, len(w)) + jnp.where(nothing, _only_slope(effective), 0.0)
        arrays = jax.tree.map(lax.stop_gradient, arrays)
    simulated = crossbar_matmul(lax.stop_gradient(xs), arrays, key if reads is None else reads)
    plain = jnp.matmul(xs, effective)
    return (plain + lax.stop_gradient(simulated - plain)) * (scale * input_scale)


def _offset(design: Design) -> int:
    """What is added to a weight before it is stored."""
    return 2 ** (design.weight_bits - 1) if design.signs == "offset" else 0


def _only_slope(v: Array) -> Array:
    """0, with the gradient of v."""
    return v - lax.stop_gradient(v)


def _growing(arrays: Programmed, whole: Array, w: Array) -> Programmed:
    """Arrays whose levels, now floats, have the gradient c / u with respect to what is stored, u, of the weights w."""
    design, cells = arrays.design, arrays.cells
    offset = _offset(design)
    stored, slope = (whole + offset, w) if offset else (jnp.abs(whole), jnp.sign(whole).astype(w.dtype) * w)
    growth = _only_slope(slope) / jnp.maximum(stored, 1).astype(w.dtype)
    groups, rows, _, filters = cells.cells.shape
    growth = jnp.pad(growth, ((0, groups * rows - len(w)), (0, 0))).reshape(groups, rows, 1, filters)
    level = cells.cells.astype(jnp.float32)
    if cells.flip is None:
        level = level * (1 + growth)
    else:
        top = design.device.top
        level = jnp.where(cells.flip[:, None], top - (top - level) * (1 + growth), level * (1 + growth))
    return with_cells(arrays, level)


def _traced(w: Array, design: Design) -> Programmed:
    rows, filters = w.shape
    small = design.active_rows <= TABLE_ROWS and design.dac_bits == 1
    return Programmed(
        rows=jnp.arange(rows, dtype=jnp.int32),
        limbs=w.astype(jnp.float32)[None],
        cells=encode(w, design),
        planes=None,
        tables=None,
        proven=jnp.zeros((0,), jnp.int32),
        simulated=jnp.arange(filters, dtype=jnp.int32),
        place=jnp.arange(filters, dtype=jnp.int32),
        gain=None,
        shift=None,
        design=design,
        inputs=rows,
        filters=filters,
        path="table" if small else "folded",
        exact_rows=1,
        limb_cycles=worst_limb_cycles(rows, design),
    )
