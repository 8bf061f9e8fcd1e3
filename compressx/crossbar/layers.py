"""Layers on crossbars, and whole flax models run with their matrix products replaced by the simulated hardware.

    deployed = {"Conv_0": deploy(kernel, scale, design, input_scale), ...}
    logits = simulate(model.apply, deployed)(variables, x, train=False)

Inputs are rounded to integers of the design (x = input_scale * integer), weights are scale * integers, and biases,
normalisation and activations stay digital. Gradients are straight-through.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from compressx.crossbar.arrays import Programmed
from compressx.crossbar.design import Design
from compressx.crossbar.mvm import crossbar_matmul
from compressx.crossbar.program import program
from compressx.crossbar.recurrent import Recurrent, is_recurrent, path_of, plain
from compressx.crossbar.sot_mram import Operands, Planes


@partial(jax.tree_util.register_dataclass, data_fields=("groups", "scale", "input_scale", "key"), meta_fields=())
@dataclass(frozen=True)
class Deployed:
    """A layer's weights on crossbars; a pytree.

    Attributes:
      groups: arrays of each group of filters (one, but for grouped convolutions): of a crossbar, or of SOT-MRAM.
      scale: float32 `[]` or `[cout]`: weight = scale * integer.
      input_scale: float32 `[]`: input = input_scale * integer.
      key: for read noise, or None. It is folded with the number of the call and of the group of filters; another batch
        needs another key (`network.read_again`).

    Example:
      >>> from compressx import crossbar
      >>> layer = crossbar.deploy(np.array([[0.5], [-1.0]]), 0.5, crossbar.isaac(), input_scale=1.0)
      >>> len(layer.groups), float(layer.scale), layer.groups[0].filters
      (1, 0.5, 1)
    """

    groups: tuple[Programmed | Planes, ...]
    scale: Array
    input_scale: Array
    key: Array | None = None


def deploy(
    w: Any,
    scale: Any,
    design: Design,
    input_scale: float,
    rows: Sequence[int] | np.ndarray | None = None,
    groups: int = 1,
    name: str = "weights",
    **options: Any,
) -> Deployed:
    """Lays a trained weight on crossbars.

    Args:
      w: dense `[in, out]` or convolution `[kh, kw, cin/groups, cout]`, every value `scale` times an integer.
      scale: a number, or one for each of the last axis.
      design: the engine.
      input_scale: step of the inputs (`calibrate`).
      rows: order of the rows (`rows_of`), where signs are polarized.
      groups: `feature_group_count`; `rows` then holds for every group.
      name: of the weights, for messages.
      options: of `program` (path, prove).

    Returns:
      `Deployed`, which `simulate` and `hardware` take by module path.

    Raises:
      ValueError: a weight is not on the grid, or what `program` refuses.

    Example:
      >>> from compressx import crossbar
      >>> layer = crossbar.deploy(np.array([[0.5], [-1.0]]), 0.5, crossbar.isaac(), input_scale=1.0)
      >>> np.asarray(layer.groups[0].limbs)[0].tolist()  # the weights in steps of 0.5
      [[1.0], [-2.0]]
    """
    if not input_scale > 0:
        raise ValueError(f"{name}: input_scale must be positive, got {input_scale}")
    w, scale = np.asarray(w), np.asarray(scale, np.float32)
    ratio = w.astype(np.float64) / scale.astype(np.float64)
    whole = np.rint(ratio)
    if not np.allclose(ratio, whole, rtol=0, atol=1e-3):
        raise ValueError(
            f"{name}: weights are not multiples of their scale (off by up to {np.abs(ratio - whole).max():.3g}); "
            "quantize and harden them first"
        )
    matrix = whole.astype(np.int32).reshape(-1, w.shape[-1])
    if w.shape[-1] % groups:
        raise ValueError(f"{name}: {w.shape[-1]} filters do not divide into groups={groups}")
    parts = np.split(matrix, groups, axis=1)
    arrays = tuple(program(part, design, rows=rows, name=name, **options) for part in parts)
    return Deployed(arrays, jnp.asarray(scale), jnp.asarray(input_scale, jnp.float32))


def quantize_inputs(x: Array, scale: Array, design: Design | Operands) -> Array:
    """Inputs as integers of the design, float32: clip(round(x / scale)); gradient straight-through inside the range."""
    low, high = design.input_range
    ratio = jnp.clip(x.astype(jnp.float32) / scale, float(low), float(high))
    return ratio + lax.stop_gradient(jnp.round(ratio) - ratio)


def dense(x: Array, layer: Deployed) -> Array:
    """A dense layer on crossbars, without its bias: `[..., in] -> [..., out]`, float32."""
    arrays = layer.groups[0]
    whole = quantize_inputs(x, layer.input_scale, arrays.design)
    return _product(whole, arrays, layer.key) * _spread(layer, x.ndim)


def _product(whole: Array, arrays: Programmed | Planes, key: Array | None) -> Array:
    return arrays.matmul(whole) if isinstance(arrays, Planes) else crossbar_matmul(whole, arrays, key)


def conv(
    x: Array,
    layer: Deployed,
    kernel: tuple[int, int],
    strides: tuple[int, int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "SAME",
    dilation: tuple[int, int] = (1, 1),
) -> Array:
    """A convolution on crossbars, without its bias: `[n, h, w, cin] -> [n, oh, ow, cout]`, float32.

    Patches are gathered in the order (i, j, c) of the GEMM view; one product for every output pixel.
    """
    design = layer.groups[0].design
    whole = quantize_inputs(x, layer.input_scale, design)
    groups = len(layer.groups)
    if x.shape[-1] % groups:
        raise ValueError(f"{x.shape[-1]} input channels do not divide into {groups} groups")
    outs = []
    for number, (part, arrays) in enumerate(zip(jnp.split(whole, groups, axis=-1), layer.groups, strict=True)):
        key = None if layer.key is None else jax.random.fold_in(layer.key, number)
        outs.append(_product(patches(part, kernel, strides, padding, dilation), arrays, key))
    return jnp.concatenate(outs, axis=-1) * _spread(layer, x.ndim)


def _spread(layer: Deployed, ndim: int) -> Array:
    scale = layer.scale * layer.input_scale
    return scale if scale.ndim == 0 else scale.reshape((1,) * (ndim - 1) + scale.shape)


def patches(
    x: Array,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    padding: str | Sequence[tuple[int, int]],
    dilation: tuple[int, int],
) -> Array:
    """`[n, h, w, c] -> [n, oh, ow, kh*kw*c]`, exact (slices, no product)."""
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    pads = lax.padtype_to_pads(x.shape[1:3], reach, strides, padding) if isinstance(padding, str) else list(padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    oh, ow = ((x.shape[a + 1] - reach[a]) // strides[a] + 1 for a in (0, 1))
    ends = strides[0] * (oh - 1) + 1, strides[1] * (ow - 1) + 1
    taps = [(i * dilation[0], j * dilation[1]) for i in range(kernel[0]) for j in range(kernel[1])]
    shifted = [x[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]] for i, j in taps]
    return jnp.concatenate(shifted, axis=-1)


def simulate(apply: Callable[..., Any], deployed: Mapping[str, Deployed]) -> Callable[..., Any]:
    """`apply` of a flax model with the products of some dense, convolution and recurrent layers done by crossbars.

    Args:
      apply: `model.apply`.
      deployed: layer by module path (`Conv_0`, `block/Dense_1`, `gru_0/wz`), without `params` and `kernel`.

    Returns:
      A function of the same arguments; jit it with the deployed layers closed over, or use `hardware` inside one.

    Raises:
      ValueError: when called: a deployed path is no Dense or Conv layer, and no recurrent matrix, of the model.

    Example:
      >>> import flax.linen as nn
      >>> from compressx import crossbar
      >>> kernel = jnp.array([[0.5], [-1.0]])
      >>> layers = {"": crossbar.deploy(kernel, 0.5, crossbar.isaac(), input_scale=1.0)}  # "" is the model itself
      >>> run = crossbar.simulate(nn.Dense(1, use_bias=False).apply, layers)
      >>> run({"params": {"kernel": kernel}}, jnp.array([[3.0, 1.0]])).tolist()
      [[0.5]]
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        used: set[str] = set()
        with hardware(deployed, used):
            result = apply(*args, **kwargs)
        missing = sorted(set(deployed) - used)
        if missing:
            raise ValueError(
                f"no Dense or Conv layer or recurrent matrix of the model was called at {', '.join(missing)}"
            )
        return result

    return run


def hardware(
    deployed: Mapping[str, Deployed], used: set[str] | None = None, seen: dict[str, tuple[Array, ...]] | None = None
) -> AbstractContextManager[None]:
    """A context in which calls of the deployed layers run on crossbars.

    Args:
      deployed: layer by module path.
      used: collects the paths that were called.
      seen: collects what the word lines of each layer saw (`layer_inputs`), an entry for each group of filters.

    Returns:
      A context manager, for `model.apply` inside a function that is traced.

    Raises:
      ValueError: inside the context, where a layer cannot be simulated: a convolution that is not 2-D, inputs that do
        not divide into the groups, read noise in a recurrent layer.

    Example:
      >>> import flax.linen as nn
      >>> from compressx import crossbar
      >>> kernel, used = jnp.array([[0.5], [-1.0]]), set()
      >>> layers = {"": crossbar.deploy(kernel, 0.5, crossbar.isaac(), input_scale=1.0)}
      >>> with crossbar.hardware(layers, used):
      ...     y = nn.Dense(1, use_bias=False).apply({"params": {"kernel": kernel}}, jnp.array([[3.0, 1.0]]))
      >>> y.tolist(), used
      ([[0.5]], {''})
    """

    calls: Counter[str] = Counter()

    def see(path: str, x: Array, module: nn.Module | None = None) -> None:
        if used is not None:
            used.add(path)
        if seen is not None:
            layer = deployed[path]
            fed = [layer_inputs(x, layer, module, group) for group in range(len(layer.groups))]
            before = seen.get(path)  # of an earlier call
            seen[path] = tuple(fed if before is None else map(lambda *both: jnp.concatenate(both), before, fed))

    def call(module: nn.Module, x: Array, path: str) -> Array:
        layer = deployed[path]
        if layer.key is not None:
            layer = replace(layer, key=jax.random.fold_in(layer.key, calls[path]))
        calls[path] += 1
        see(path, x, module)
        if isinstance(module, nn.Dense):
            y = dense(x, layer)
        else:
            assert isinstance(module, nn.Conv)
            y = conv(x, layer, *geometry(module, path))
        if module.use_bias:
            bias = module.variables["params"]["bias"]
            y = y + bias.reshape((1,) * (y.ndim - 1) + bias.shape).astype(y.dtype)
        return y

    def run(module: Recurrent, args: Any, kwargs: Any) -> Any:
        def product(x: Array, name: str, w: Array) -> Array:
            layer = deployed.get(path_of(module, name))
            if layer is None:
                return x @ w
            if layer.key is not None:
                raise ValueError(f"{path_of(module, name)}: read noise is not simulated in recurrent layers")
            return dense(x, layer)

        y, fed = module.run_with(product, *args, **kwargs)
        for path, x in ((path_of(module, name), x) for name, x in fed.items()):
            if path in deployed:
                see(path, x)
        return y

    def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        path = "/".join(module.path)
        if context.method_name == "__call__" and path in deployed and isinstance(module, (nn.Dense, nn.Conv)):
            return call(module, args[0], path)
        if context.method_name == "__call__" and is_recurrent(module):
            if any(p.startswith(path_of(module, "")) for p in deployed):
                return run(module, args, kwargs)
        return next_fun(*args, **kwargs)

    return nn.intercept_methods(intercept)


def calibrate(
    apply: Callable[..., Any], design: Design, *args: Any, **kwargs: Any
) -> tuple[dict[str, float], dict[str, Array]]:
    """Runs a model once and gives, for each Dense and Conv layer and recurrent matrix, input scale and inputs.

    scale = max |x| / largest input of the design; unsigned designs take only layers whose inputs are not negative.

    Args:
      apply: `model.apply`.
      design: whose largest input the scales reach.
      args, kwargs: of `apply`: the variables and one batch of examples.

    Returns:
      (scales, inputs) by module path; inputs are as the layer got them, before rounding; recurrent ones at all steps.
      A layer that is called several times has the inputs of all calls, along the first axis; where its calls differ in
      another axis, as rows `[n, features]`.

    Raises:
      ValueError: a layer of a design with unsigned inputs has negative ones.

    Example:
      >>> import flax.linen as nn
      >>> from compressx import crossbar
      >>> variables = {"params": {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}}
      >>> scales, _ = crossbar.calibrate(nn.Dense(1).apply, crossbar.forms(), variables, jnp.array([[0.0, 13107.0]]))
      >>> round(scales[""], 4)  # 16-bit inputs: 13107 / 65535
      0.2
    """
    calls: dict[str, list[Array]] = {}

    def intercept(next_fun: Callable[..., Any], given: Any, named: Any, context: Any) -> Any:
        if context.method_name == "__call__" and isinstance(context.module, (nn.Dense, nn.Conv)):
            calls.setdefault("/".join(context.module.path), []).append(given[0])
        if context.method_name == "__call__" and is_recurrent(context.module):
            y, fed = context.module.run_with(plain, *given, **named)
            for name, x in fed.items():
                calls.setdefault(path_of(context.module, name), []).append(x)
            return y
        return next_fun(*given, **named)

    with nn.intercept_methods(intercept):
        apply(*args, **kwargs)
    scales, seen = {}, {}
    for path, inputs in calls.items():
        alike = len({x.shape[1:] for x in inputs}) == 1
        seen[path] = jnp.concatenate([x if alike else x.reshape(-1, x.shape[-1]) for x in inputs])
    for path, x in seen.items():
        if design.inputs == "unsigned" and bool(jnp.any(x < 0)):
            raise ValueError(f"{path}: inputs are negative, design {design.name} has unsigned ones; use 'sign_planes'")
        top = float(jnp.max(jnp.abs(x)))
        scales[path] = (top or 1.0) / design.input_range[1]
    return scales, seen


def layer_inputs(x: Array, layer: Deployed, module: nn.Module | None = None, group: int = 0) -> Array:
    """The integers offered to a layer's word lines: int32 `[n * pixels, P]`, for `zero_skip` and `saturation`.

    All P rows in the order of the GEMM view; `Programmed.rows` picks those in use, in their order on the word lines.
    """
    design = layer.groups[0].design
    whole = jnp.round(quantize_inputs(x, layer.input_scale, design)).astype(jnp.int32)
    if isinstance(module, nn.Conv):
        part = jnp.split(whole, len(layer.groups), axis=-1)[group]
        whole = patches(part, *geometry(module, module.name or "conv"))
    return whole.reshape(-1, whole.shape[-1])


def geometry(module: nn.Conv, path: str) -> tuple[Any, Any, Any, Any]:
    """Kernel, strides, padding and dilation of a 2-D convolution."""
    pair = lambda v: (1, 1) if v is None else (v, v) if isinstance(v, int) else tuple(v)
    kernel = pair(module.kernel_size)
    padding: Any = module.padding
    if len(kernel) != 2 or padding in ("CIRCULAR", "CAUSAL") or pair(module.input_dilation) != (1, 1):
        raise ValueError(f"{path}: only 2-D convolutions with SAME, VALID or explicit padding run on crossbars")
    if isinstance(padding, int):
        padding = ((padding, padding),) * 2
    elif not isinstance(padding, str):
        padding = tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)
    return kernel, pair(module.strides), padding, pair(module.kernel_dilation)
