"""Networks for other runtimes: StableHLO through `jax.export`, and ONNX.

Both hold the network as it computes, weights inside, batch size free. Weights are dense: a masked network carries its
zeros (no sparse initializers, which few runtimes execute); a compacted network is smaller because its layers are:

    small = compaction.compact(module, variables, x)
    data = export.onnx(small.apply, small.variables, (32, 32, 3))

What the network takes is a shape, or a tree of them where it takes several inputs:

    export.onnx(module, variables, (32, 32, 3))                          # float32 [batch, 32, 32, 3]
    export.onnx(decoder, variables, (64,), dtype=jnp.int32)              # tokens [batch, 64]
    export.onnx(f, variables, {"image": (32, 32, 3), "text": jax.ShapeDtypeStruct((1, 64), jnp.int32)})

Convolutions are traced as `lax.conv_general_dilated`, whatever this machine computes them with.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from compressx.native.convolve import lax_only
from compressx.trace import Function, function_of


def stablehlo(
    module: nn.Module | Function,
    variables: Any,
    shape: Any,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    *,
    dtype: Any = None,
) -> bytes:
    """The network as serialized StableHLO, to be run by `jax.export.deserialize(data).call(x)`.

    Args:
      module: called as `module.apply(variables, x)`; or a function `f(variables, x)`, as compaction makes it.
      variables: its parameters and batch statistics.
      shape: what the network takes, as `onnx` describes it.
      platforms: what it is lowered for.
      dtype: of the inputs that are described by a shape alone.

    Returns:
      The bytes of a `jax.export.Exported` for any batch size of 1 or more.

    Raises:
      ImportError: flatbuffers is not installed (`pip install 'compressx[export]'`).
      ValueError: `shape` does not describe inputs, or the network depends on the number of its inputs.

    Example:
      >>> dense = lambda v, x: x @ v["kernel"]
      >>> data = compressx.export.stablehlo(dense, {"kernel": jnp.eye(2)}, (2,), platforms=("cpu",))
      >>> jax.export.deserialize(bytearray(data)).call(jnp.array([[1.0, 2.0]])).tolist()
      [[1.0, 2.0]]
    """
    try:
        import flatbuffers
    except ImportError:
        raise ImportError("StableHLO needs flatbuffers: pip install 'compressx[export]'") from None
    make = jax.export.export(jax.jit(portable(module, variables)), platforms=tuple(platforms))
    exported = _traced(make, shape, dtype)[0]
    return bytes(exported.serialize())


def onnx(
    module: nn.Module | Function, variables: Any, shape: Any, name: str = "compressx", *, dtype: Any = None
) -> bytes:
    """The network as an ONNX model (opset 18).

    The graph is made from the traced program, so it is what the module computes. Images stay `[n, h, w, c]` outside,
    and each convolution stands between two transpositions, which runtimes cancel. `scan` and the loops of `jax.lax`
    are ONNX' own. bfloat16 is stored as such, and computed as float32 rounded to bfloat16 after each operation; inputs
    and outputs of the model are float32 then, for few runtimes take bfloat16.

    A single input is called `x`, a single output `y`. Of several, each is called by its path in the tree (`a`, `a/0`),
    after an `x` or `y` where that begins with a number (`x0`, `x1`), and an output with an input's name by that name
    and `_out`.

    Args:
      module: called as `module.apply(variables, x)`; or a function `f(variables, x)`, as compaction makes it. One of
        several arguments is wrapped: `lambda variables, x: module.apply(variables, *x)`.
      variables: its parameters and batch statistics.
      shape: of one input without the batch axis, such as `(h, w, c)`; or a `jax.ShapeDtypeStruct` or array like the
        whole input, whose first axis is the batch, of any length; or a tree of these, as the network takes it.
      name: of the graph.
      dtype: of the inputs that are described by a shape alone: float32 unless given, or int32 where the network takes
        no float32 (tokens).

    Returns:
      The bytes of a checked `ModelProto`.

    Raises:
      ImportError: onnx is not installed.
      ValueError: the network does something that has no counterpart here (the text names the operation), depends on
        the number of its inputs, or takes more than the 2 GiB that a single ONNX file may hold.

    Example:
      >>> import onnx
      >>> dense = lambda v, x: x @ v["kernel"]
      >>> model = onnx.load_from_string(compressx.export.onnx(dense, {"kernel": jnp.eye(2)}, (2,)))
      >>> model.graph.input[0].name, model.graph.output[0].name, model.opset_import[0].version
      ('x', 'y', 18)
    """
    try:
        from compressx.export import onnx_graph
    except ImportError:
        raise ImportError("ONNX export needs onnx: pip install 'compressx[export]'") from None
    (traced, out), inputs = _traced(jax.make_jaxpr(portable(module, variables), return_shape=True), shape, dtype)
    taken = _names(inputs, "x")
    given = [label if label not in taken else f"{label}_out" for label in _names(out, "y")]
    if len({*taken, *given}) < len(taken) + len(given):
        raise ValueError(f"ONNX: inputs {taken} and outputs {given} are to have different names; rename their keys")
    return onnx_graph.convert(traced, taken, given, name)


def portable(module: nn.Module | Function, variables: Any) -> Callable[[Any], Any]:
    """`x -> f(variables, x)` of a module in evaluation mode, with every convolution left to the runtime.

    None is unrolled for this machine.

    Args:
      module: called as `module.apply(variables, x)`; or a function `f(variables, x)`.
      variables: its parameters and batch statistics.

    Returns:
      A function of the inputs alone, to be traced, lowered or exported.

    Example:
      >>> f = compressx.export.portable(lambda v, x: x @ v["kernel"], {"kernel": jnp.eye(2)})
      >>> f(jnp.array([[1.0, 2.0]])).tolist()
      [[1.0, 2.0]]
    """

    function = function_of(module)

    def apply(x: Any) -> Any:
        with lax_only():
            return function(variables, x)

    return apply


def _traced(make: Callable[[Any], Any], shape: Any, dtype: Any) -> tuple[Any, Any]:
    """What `make` gives for the described inputs, and those inputs with a batch axis of symbolic size."""
    inputs = _inputs(shape, jnp.float32 if dtype is None else dtype)
    try:
        return make(inputs), inputs
    except jax.errors.InconclusiveDimensionOperation as error:
        text = f"the network depends on the number of its inputs, and cannot be written for any: {error}"
        raise ValueError(text) from error
    except (TypeError, ValueError):
        tokens = _inputs(shape, jnp.int32)
        if dtype is not None or tokens == inputs:
            raise
        try:
            return make(tokens), tokens
        except (TypeError, ValueError, jax.errors.InconclusiveDimensionOperation):
            pass  # it is not for its type that the network could not be traced
        raise


def _inputs(shape: Any, dtype: Any) -> Any:
    (batch,) = jax.export.symbolic_shape("batch")

    def described(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        if _is_shape(leaf):
            return jax.ShapeDtypeStruct((batch, *leaf), dtype)
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            where = jax.tree_util.keystr(path) or "itself"
            raise ValueError(f"shape {where} is {leaf!r}: give a tuple such as (32, 32, 3), or a ShapeDtypeStruct")
        if not leaf.shape:
            where = jax.tree_util.keystr(path) or "itself"
            raise ValueError(f"shape {where} is {leaf}: its first axis is the batch, and it has none")
        return jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype)

    inputs = jax.tree_util.tree_map_with_path(described, shape, is_leaf=_is_shape)
    if not jax.tree.leaves(inputs):
        raise ValueError(f"shape is {shape!r}, which describes no input")
    return inputs


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, (tuple, list)) and all(isinstance(n, (int, np.integer)) for n in leaf)


def _names(tree: Any, letter: str) -> list[str]:
    """Names of the leaves of a tree: `letter` for a single one, else their paths."""
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)]
    if len(paths) == 1:
        return [letter]
    return [letter + path if not path or path[0].isdigit() else path for path in paths]
