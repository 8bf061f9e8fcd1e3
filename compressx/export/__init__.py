"""Networks for other runtimes: StableHLO through `jax.export`, and ONNX.

Both hold the network as it computes, weights inside, batch size free. Weights are dense: a masked network carries its
zeros (no sparse initializers, which few runtimes execute); a compacted network is smaller because its layers are:

    small = compaction.compact(module, variables, x)
    data = export.onnx(small.apply, small.variables, (32, 32, 3))

Convolutions are traced as `lax.conv_general_dilated`, whatever this machine computes them with.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from compressx.native.convolve import lax_only

Apply = Callable[[Array], Array]
Function = Callable[[Any, Array], Any]  # of variables and x


def stablehlo(
    module: nn.Module | Function,
    variables: Any,
    shape: Sequence[int],
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> bytes:
    """The network as serialized StableHLO, to be run by `jax.export.deserialize(data).call(x)`.

    Args:
      module: called as `module.apply(variables, x)`; or a function `f(variables, x)`, as compaction makes it.
      variables: its parameters and batch statistics.
      shape: of one input, without the batch axis: `(h, w, c)`.
      platforms: what it is lowered for.

    Returns:
      The bytes of a `jax.export.Exported` for float32 `[batch, *shape]`, any batch size of 1 or more.

    Raises:
      ImportError: flatbuffers is not installed (`pip install 'compressx[export]'`).
    """
    try:
        import flatbuffers
    except ImportError:
        raise ImportError("StableHLO needs flatbuffers: pip install 'compressx[export]'") from None
    apply = portable(module, variables)
    exported = jax.export.export(jax.jit(apply), platforms=tuple(platforms))(_input(shape))
    return bytes(exported.serialize())


def onnx(module: nn.Module | Function, variables: Any, shape: Sequence[int], name: str = "compressx") -> bytes:
    """The network as an ONNX model (opset 17): input `x` float32 `[batch, *shape]`, output `y`.

    The graph is made from the traced program, so it is what the module computes; batch normalisation becomes one
    multiplication and one addition with precomputed constants. Images stay `[n, h, w, c]` outside, and each convolution
    stands between two transpositions, which runtimes cancel.

    Args:
      module: called as `module.apply(variables, x)`; or a function `f(variables, x)`, as compaction makes it.
      variables: its parameters and batch statistics.
      shape: of one input, without the batch axis.
      name: of the graph.

    Returns:
      The bytes of a checked `ModelProto`.

    Raises:
      ImportError: onnx is not installed.
      ValueError: the network does something that has no counterpart here (the text names the operation), or takes more
        than the 2 GiB that a single ONNX file may hold.
    """
    try:
        from compressx.export import onnx_graph
    except ImportError:
        raise ImportError("ONNX export needs onnx: pip install 'compressx[export]'") from None
    traced = jax.make_jaxpr(portable(module, variables))(_input(shape))
    return onnx_graph.convert(traced, name)


def portable(module: nn.Module | Function, variables: Any) -> Apply:
    """`x -> module.apply(variables, x)`, or `f(variables, x)`, with every convolution left to the runtime.

    None is unrolled for this machine.
    """

    def plain(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if type(context.module) is nn.Conv and context.method_name == "__call__" and args[0].ndim == 4:
            return _convolve(context.module, args[0])
        return next_fun(*args, **kwargs)

    def apply(x: Array) -> Array:
        with lax_only(), nn.intercept_methods(plain):
            if isinstance(module, nn.Module):
                return module.apply(variables, x)  # type: ignore[return-value]
            y: Array = module(variables, x)
            return y

    return apply


def _convolve(conv: nn.Conv, x: Array) -> Array:
    """What `nn.Conv` computes on `[n, h, w, c]`, as one `lax.conv_general_dilated`."""
    held = conv.variables["params"]
    strides, dilation = _pair(conv.strides), _pair(conv.kernel_dilation)
    padding: str | list[tuple[int, int]]
    if isinstance(conv.padding, str):
        padding = conv.padding
    else:
        sides = [conv.padding] * 2 if isinstance(conv.padding, int) else conv.padding
        padding = [(p, p) if isinstance(p, int) else (p[0], p[1]) for p in sides]
    y = lax.conv_general_dilated(
        x,
        held["kernel"],
        strides,
        padding,
        lhs_dilation=_pair(conv.input_dilation),
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=conv.feature_group_count,
    )
    return y + held["bias"][None, None, None] if conv.use_bias else y


def _pair(value: int | Sequence[int] | None) -> tuple[int, int]:
    if value is None:
        return 1, 1
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _input(shape: Sequence[int]) -> jax.ShapeDtypeStruct:
    batch = jax.export.symbolic_shape("batch")
    return jax.ShapeDtypeStruct((*batch, *shape), jnp.float32)
