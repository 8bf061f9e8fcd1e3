"""Convolution with sparse kernels: reference, XLA path, the native one and Pallas behind a single call.

    conv = kernels.prepare(packed, (1, 56, 56, 256), bias=b, activation="relu")
    y = conv(x)                                        # NHWC in and out; `conv.path` says what it runs on

Between layers of a network no layout is converted, see `network.compile`. All paths equal the dense convolution with
the zeros in place, to float tolerance (sums are added in another order). NaN and infinities spread alike on all of
them: a weight that is zero and what lies beyond the image take no part.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compressx.formats.base import Packed
from compressx.kernels import exact, native, pallas, plans, schedule
from compressx.kernels.grid import Grid, elements, grid, valid, window_source
from compressx.kernels.schedule import Geometry, Loads, Pads, Plan, Sparse

ACTIVATIONS = ("none", "relu", "relu6", "leaky")
SLOPE = 0.1  # of "leaky", Darknet's: max(y, 0.1 y)


@np.errstate(invalid="ignore")
def reference(
    x: np.ndarray,
    w: np.ndarray,
    geometry: Geometry,
    bias: np.ndarray | None = None,
    activation: str = "none",
    residual: np.ndarray | None = None,
    residual_after: bool = False,
) -> np.ndarray:
    """The definition, in NumPy float64: `act(sum_{i,j,c} x[sy+i-top, sx+j-left, c] w[i, j, c, f] + b_f + residual)`.

    The sum is over weights that are not zero and elements of the image: NaN and infinities elsewhere take no part.

    Args:
      x: `[n, h, w, cin]`.
      w: `[kh, kw, cin / groups, cout]`, zeros in place.
      geometry: size, strides, pads, groups.
      bias: `[cout]`.
      activation: one of `ACTIVATIONS`.
      residual: `[n, oh, ow, cout]`, added before the activation.
      residual_after: the residual is added after the activation instead, as in Darknet.

    Returns:
      float64 `[n, oh, ow, cout]`.

    Example:
      >>> from compressx import kernels
      >>> one = kernels.Geometry(size=(1, 1), strides=(1, 1), pads=((0, 0), (0, 0)))
      >>> x, w = np.array([1.0, 2.0]).reshape(1, 1, 1, 2), np.array([3.0, 0.0]).reshape(1, 1, 2, 1)
      >>> kernels.reference(x, w, one, bias=np.array([-1.0])).item()
      2.0
    """
    (kh, kw), (sh, sw), pads, groups = geometry
    n, h, width, cin = x.shape
    oh, ow = geometry.out(h, width)
    cout = w.shape[3]
    x, y = x.astype(np.float64), np.zeros((n, oh, ow, cout))
    for i in range(kh):
        for j in range(kw):
            rows, columns = _inside(i - pads[0][0], sh, h, oh), _inside(j - pads[1][0], sw, width, ow)
            window = x[:, rows.start * sh + i - pads[0][0] :: sh, columns.start * sw + j - pads[1][0] :: sw]
            window = window[:, : len(rows), : len(columns)]
            for k in range(groups):
                inputs = window[..., k * cin // groups : (k + 1) * cin // groups]
                outputs = slice(k * cout // groups, (k + 1) * cout // groups)
                part = y[:, rows.start : rows.stop, columns.start : columns.stop, outputs]
                part += exact.reference(inputs, w[i, j, :, outputs].astype(np.float64))
    if bias is not None:
        y += bias
    if residual is not None and not residual_after:
        y += residual
    if activation == "leaky":
        y = np.maximum(y, SLOPE * y)
    elif activation != "none":
        y = np.maximum(y, 0)
    if activation == "relu6":
        y = np.minimum(y, 6)
    return y + residual if residual is not None and residual_after else y


def _inside(offset: int, stride: int, size: int, outputs: int) -> range:
    """The outputs whose element `stride * output + offset` lies in an image of that size."""
    first = min(max(0, -(offset // stride)), outputs)
    return range(first, max(first, min(outputs, (size - offset - 1) // stride + 1)))


def xla(
    x: jax.Array,
    w: jax.Array,
    geometry: Geometry,
    bias: jax.Array | None = None,
    activation: str = "none",
    residual: jax.Array | None = None,
    residual_after: bool = False,
    scale: jax.Array | None = None,
    precision: Any = None,
) -> jax.Array:
    """The convolution of `reference` as XLA's dense one with the zeros in place: the fastest that XLA alone offers.

    It is what runs where no kernel does.

    Args:
      x: float32 `[n, h, w, cin]`.
      w: float32 `[kh, kw, cin / groups, cout]`, zeros in place.
      geometry: size, strides, pads, groups.
      bias: `[cout]`.
      activation: one of `ACTIVATIONS`.
      residual: `[n, oh, ow, cout]`, added before the activation.
      residual_after: the residual is added after the activation instead.
      scale: `[cout]`, multiplies the sums before the bias is added.
      precision: of the product, as in `jax.lax`.

    Returns:
      `[n, oh, ow, cout]`; differentiable in images and weights.

    Example:
      >>> from compressx import kernels
      >>> one = kernels.Geometry(size=(1, 1), strides=(1, 1), pads=((0, 0), (0, 0)))
      >>> x, w = jnp.array([1.0, 2.0]).reshape(1, 1, 1, 2), jnp.array([3.0, 0.0]).reshape(1, 1, 2, 1)
      >>> kernels.xla(x, w, one, bias=jnp.array([-1.0])).item()
      2.0
    """
    y = exact.linear(exact.dense_conv(geometry, precision), x, w, geometry.groups)
    return finish(y, bias, activation, residual, residual_after, scale)


def on_blocks(
    x: jax.Array,
    w: pallas.Blocks,
    geometry: Geometry,
    bias: jax.Array | None = None,
    activation: str = "none",
    residual: jax.Array | None = None,
    residual_after: bool = False,
    scale: jax.Array | None = None,
) -> jax.Array:
    """The same from live blocks, by Pallas on `pallas.target()`; what follows the sum is XLA's."""
    backend, interpret = pallas.target()
    y = pallas.block_sparse_conv(x, w, geometry=geometry, backend=backend, interpret=interpret)
    return finish(y, bias, activation, residual, residual_after, scale)


def finish(
    y: jax.Array,
    bias: jax.Array | None,
    activation: str,
    residual: jax.Array | None,
    residual_after: bool,
    scale: jax.Array | None = None,
) -> jax.Array:
    """`act(scale * y + bias + residual)`, or `act(scale * y + bias) + residual`."""
    if scale is not None:
        y = y * scale[None, None, None]
    if bias is not None:
        y = y + bias[None, None, None]
    if residual is not None and not residual_after:
        y = y + residual
    if activation == "relu":
        y = jnp.maximum(y, 0)
    if activation == "relu6":
        y = jnp.clip(y, 0, 6)
    if activation == "leaky":
        y = jnp.maximum(y, SLOPE * y)
    return y + residual if residual is not None and residual_after else y


class Layer(NamedTuple):
    """A layer ready for the native loops: arrays (a pytree of jit arguments), what is fixed about it, and its loads."""

    arrays: dict[str, Any]
    fixed: "Fixed"
    loads: Loads


class Fixed(NamedTuple):
    """The static part of a `Layer`. `guarded`: it holds fillers, or weights that are NaN or infinite."""

    grid: Grid
    phases: int
    taps: int
    filters: int
    width: int
    groups: int
    columns: bool
    activation: str
    residual_after: bool
    couts: int
    guarded: bool


def layer(
    s: Sparse,
    geometry: Geometry,
    grid: Grid,
    plan: Plan,
    bias: np.ndarray | None = None,
    activation: str = "none",
    inside: Grid | None = None,
    residual_after: bool = False,
    image: tuple[int, int] | None = None,
) -> Layer:
    """Sorts the weights as the plan says and gathers what the native call needs.

    `grid` is the output's and `inside` the input's, where they differ: in their margins, and in the size of images.
    `image` is the rows and columns of the input before its phases are cut out; None: all that `inside` has room for.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"no activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
    inside, strides = inside or grid, geometry.strides
    t = schedule.stream(s, geometry, inside, plan)
    arrays = {
        name: getattr(t, name) for name in ("weight", "members", "visits", "starts", "offsets", "places", "order")
    }
    couts = len(s.order)
    arrays["bias"] = np.zeros(couts, np.float32) if bias is None else np.asarray(bias, np.float32) + np.float32(0)
    arrays["valid"] = valid(grid)
    size = image or (inside.h * strides[0], inside.w * strides[1])
    arrays["real"] = elements(inside, size, strides, tuple(geometry.phases()))
    most = native.WIDTHS[native.isa_of(grid)][t.taps == 0]
    width = min(plan.width, most, grid.segment)
    counts = (len(geometry.phases()), t.taps, t.filters, width, t.groups)
    guarded = bool(schedule.fillers(t.weight).any()) or not np.isfinite(t.weight).all()
    fixed = Fixed(grid, *counts, plan.columns, activation, residual_after, couts, guarded)
    return Layer(arrays, fixed, schedule.loads(t, width))


def run(
    fixed: Fixed, arrays: dict[str, Any], x: jax.Array, residual: jax.Array | None = None, threads: int = 0
) -> jax.Array:
    """The native convolution of planes: `[cin * phases, plane, lanes] -> [cout, plane, lanes]`. It has no gradient.

    Input, residual and output have the same segments, each with the margins of its own grid.
    Safe under concurrent calls: nothing is shared but the read-only operands. Packed arrays are checked in the call; a
    corrupted one is an error (XlaRuntimeError), never an access outside the buffers.
    """
    g = fixed.grid
    names = ("weight", "members", "visits", "starts", "offsets", "places", "order", "bias", "valid", "real")
    extra = jnp.zeros(0, jnp.float32) if residual is None else residual
    margin = lambda planes: (planes.shape[1] - g.segment) // 2
    return native.call(
        "compressx_pattern_conv",
        (fixed.couts, g.plane, g.lanes),
        x,
        *(arrays[name] for name in names),
        extra,
        isa=native.isa_of(g),
        segment=g.segment,
        margin=g.margin,
        margin_in=margin(x),
        margin_add=0 if residual is None else margin(residual),
        row=g.row,
        planes=fixed.phases,
        taps=fixed.taps,
        filters=fixed.filters,
        width=fixed.width,
        groups=fixed.groups,
        columns=int(fixed.columns),
        guarded=int(fixed.guarded),
        activation=ACTIVATIONS.index(fixed.activation),
        after=int(fixed.residual_after),
        threads=threads,
    )


def layer_grid(geometry: Geometry, shape: tuple[int, int, int], lanes: int) -> Grid:
    """The grid of a layer's output for inputs `[n, h, w]`, on which its phases lie too."""
    n, h, w = shape
    oh, ow = geometry.out(h, w)
    return grid(n, *geometry.cover(h, w), geometry.gap(h, w), geometry.reach(), lanes)._replace(h=oh, w=ow)


def phase_grid(geometry: Geometry, g: Grid, h: int, w: int) -> Grid:
    """The cells of `g`, on which the phases of an input of `h` rows and `w` columns lie."""
    (sh, sw) = geometry.strides
    return g._replace(h=-(-h // sh), w=-(-w // sw))


def input_grid(n: int, h: int, w: int, lanes: int) -> Grid:
    """A grid for images whose phases are cut out."""
    return grid(n, h, w, (1, 1), (1, 1), lanes)


class Convolution:
    """A prepared convolution, called with NHWC images; differentiable in its image and residual, not in its weights.

    Attributes:
      path: `native/<instruction set>`, `pallas/<gpu, tpu or interpret>` or `xla`.
      plan: how it is run natively, or None.

    Source: W. Niu et al., "PatDNN", 2020 (filter kernel reorder, load redundancy elimination).

    Example:
      >>> w = np.zeros((3, 3, 1, 2), np.float32)
      >>> w[1, 1] = 2.0  # the middle tap alone
      >>> conv = compressx.kernels.prepare(w, (1, 2, 2, 1), path="xla")
      >>> conv.path, conv(jnp.ones((1, 2, 2, 1))).ravel().tolist()
      ('xla', [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    """

    def __init__(
        self,
        s: Sparse,
        shape: tuple[int, int, int, int],
        geometry: Geometry,
        bias: np.ndarray | None,
        activation: str,
        residual_after: bool,
        plan: Plan | None,
        threads: int,
        path: str,
        blocks: pallas.Blocks | None = None,
    ):
        self.geometry, self.activation, self.threads, self.path, self.plan = geometry, activation, threads, path, plan
        self.shape, self.residual_after = shape, residual_after
        self.weight = jnp.asarray(schedule.dense(s))
        self.bias = None if bias is None else jnp.asarray(bias, jnp.float32)
        if path == "xla":
            self._fast = None
            return
        if blocks is not None:
            self._fast = jax.jit(
                lambda a, x, r: on_blocks(x, a["blocks"], geometry, a["bias"], activation, r, residual_after)
            )
            self._arrays: dict[str, Any] = {"blocks": blocks, "bias": self.bias}
            return
        n, h, w, _ = shape
        lanes = native.LANES[path.removeprefix("native/")]
        g = layer_grid(geometry, (n, h, w), lanes)
        if plan is None:
            self.plan = plan = plans.guess(s, geometry, g, plans.cores(threads))
        inside = phase_grid(geometry, g, h, w)
        ready = layer(s, geometry, g, plan, bias, activation, inside, residual_after, (h, w))
        arrays = jax.tree.map(jnp.asarray, ready.arrays)
        strided = geometry.strides != (1, 1)
        wide = input_grid(n, h, w, lanes)
        if strided:
            arrays["source"] = jnp.asarray(window_source(wide, inside, geometry.strides, geometry.phases()))
            arrays["phase_valid"] = jnp.asarray(valid(inside))

        def native_call(arrays: Any, x: jax.Array, residual: jax.Array | None) -> jax.Array:
            if strided:
                planes = native.to_planes(x, wide, threads)
                planes = native.resample(planes, wide, inside, arrays["source"], arrays["phase_valid"], (1, 1), threads)
            else:
                planes = native.to_planes(x, inside, threads)
            extra = None if residual is None else native.to_planes(residual, g, threads)
            return native.from_planes(run(ready.fixed, arrays, planes, extra, threads), g, threads)

        self._fast = jax.jit(native_call)
        self._arrays = arrays

    def __call__(self, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        """Convolves images `[n, h, w, cin]`, adds bias and residual `[n, oh, ow, cout]`, and activates, in its order.

        Raises:
          ValueError: the shape or dtype is not what the convolution was prepared for.
        """
        if tuple(x.shape) != tuple(self.shape) or x.dtype != jnp.float32:
            raise ValueError(f"prepared for float32 {list(self.shape)}, called with {x.dtype} {list(x.shape)}")
        if residual is not None:
            (n, h, w, _), expected = self.shape, self.weight.shape[3]
            if tuple(residual.shape) != (n, *self.geometry.out(h, w), expected):
                raise ValueError(f"residual of shape {list(residual.shape)} does not fit the output")
        if self._fast is None:
            return xla(x, self.weight, self.geometry, self.bias, self.activation, residual, self.residual_after)
        return _differentiable(self, x, residual)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(conv: Convolution, x: jax.Array, residual: jax.Array | None) -> jax.Array:
    assert conv._fast is not None
    return conv._fast(conv._arrays, x, residual)


def _backward(conv: Convolution, saved: Any, g: jax.Array) -> Any:
    """Through XLA's dense convolution: gradients are for training, where the weights are dense anyway."""
    x, residual = saved
    f = lambda x, r: xla(x, conv.weight, conv.geometry, conv.bias, conv.activation, r, conv.residual_after)
    return jax.vjp(f, x, residual)[1](g)


_differentiable.defvjp(lambda conv, x, residual: (_differentiable(conv, x, residual), (x, residual)), _backward)


def supports(w: Packed | np.ndarray, geometry: Geometry, shape: tuple[int, ...]) -> bool | str:
    """True where the native path runs the layer here, or the reason why not.

    Args:
      w: packed weight, or `[kh, kw, cin / groups, cout]`; only its shape matters.
      geometry: size, strides, pads, groups.
      shape: of the images, `[n, h, w, cin]`.

    Returns:
      True, or a sentence.

    Example:
      >>> from compressx import kernels
      >>> valid = kernels.Geometry(size=(3, 3), strides=(1, 1), pads=((0, 0), (0, 0)))
      >>> kernels.supports(np.ones((3, 3, 1, 1), np.float32), valid, (1, 2, 2, 1))
      'kernels (3, 3) do not fit images of 2x2 with pads ((0, 0), (0, 0))'
    """
    dims = tuple(w.shape)
    if len(dims) != 4 or len(shape) != 4 or 0 in dims or 0 in shape:
        return f"needs images [n, h, w, cin] and kernels [kh, kw, cin, cout], got {list(shape)} and {list(dims)}"
    if min(geometry.out(shape[1], shape[2])) < 1:
        return f"kernels {geometry.size} do not fit images of {shape[1]}x{shape[2]} with pads {geometry.pads}"
    if min(*geometry.pads[0], *geometry.pads[1]) < 0:
        return f"negative pads {geometry.pads}"
    if not native.available():
        return "no native kernels here: no compiler, COMPRESSX_NATIVE=off, or another backend than the CPU"
    return True


def prepare(
    w: Packed | np.ndarray,
    shape: tuple[int, int, int, int],
    *,
    strides: int | tuple[int, int] = 1,
    padding: str | Pads = "SAME",
    groups: int = 1,
    bias: np.ndarray | None = None,
    activation: str = "none",
    residual_after: bool = False,
    plan: Plan | None = None,
    threads: int = 0,
    path: str | None = None,
) -> Convolution:
    """Makes a convolution ready: weights sorted for the loops, geometry fixed.

    Args:
      w: FKW, another packed weight, or the weight `[kh, kw, cin / groups, cout]` with its zeros in place.
      shape: of the images, `[n, h, w, cin]`.
      strides: rows, columns.
      padding: `SAME`, `VALID`, or zeros before and after per axis.
      groups: of channels.
      bias: `[cout]`.
      activation: one of `ACTIVATIONS`.
      residual_after: whether a residual is added after the activation.
      plan: how it is run; None: what the model of `tuning` predicts to be best.
      threads: at most so many, 0 for all of XLA's pool.
      path: "xla", "native", "pallas", or None for the native one where it runs, else Pallas on a GPU or TPU that
        supports the layer and has half of its blocks or more to skip, else XLA. "pallas" on a CPU interprets.

    Returns:
      A `Convolution`, called with images of that shape.

    Raises:
      ValueError: shapes that do not fit each other, or a path that does not run here.
      CompressedFileError: packed arrays that are damaged.

    Source: W. Niu et al., "PatDNN", 2020 (filter kernel reorder, load redundancy elimination, tuning).

    Example:
      >>> conv = compressx.kernels.prepare(np.ones((3, 3, 1, 2), np.float32), (1, 4, 4, 1), path="xla")
      >>> conv(jnp.ones((1, 4, 4, 1))).shape
      (1, 4, 4, 2)
    """
    from compressx import formats

    if isinstance(w, Packed):
        s = schedule.from_fkw(w) if w.format in schedule.FKW else schedule.from_weight(formats.unpack(w))
    else:
        s = schedule.from_weight(w)
    if len(shape) != 4 or len(s.shape) != 4:
        raise ValueError(f"images [n, h, w, cin] and kernels [kh, kw, cin, cout], got {list(shape)}, {list(s.shape)}")
    kh, kw, cin, cout = s.shape
    if groups < 1 or shape[3] != cin * groups or cout % groups:
        raise ValueError(f"{shape[3]} channels in {groups} groups do not fit kernels {list(s.shape)}")
    if bias is not None and np.shape(bias) != (cout,):
        raise ValueError(f"bias of shape {list(np.shape(bias))} for {cout} filters")
    if activation not in ACTIVATIONS:
        raise ValueError(f"no activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
    both = (strides, strides) if isinstance(strides, int) else strides
    if isinstance(padding, str):
        found = lax.padtype_to_pads(shape[1:3], (kh, kw), both, padding)
        padding = ((int(found[0][0]), int(found[0][1])), (int(found[1][0]), int(found[1][1])))
    geometry = Geometry((kh, kw), both, padding, groups)
    if min(geometry.out(shape[1], shape[2])) < 1:
        raise ValueError(f"kernels {geometry.size} do not fit images of {shape[1]}x{shape[2]} with pads {padding}")
    reason = supports(w, geometry, shape)
    if path not in (None, "xla", "native", "pallas"):
        raise ValueError(f"no path {path!r}; the paths are native, pallas and xla")
    if path == "native" and reason is not True:
        raise ValueError(f"the native path does not run: {reason}")
    more = (activation, residual_after, plan, threads)
    if path in (None, "native") and reason is True:
        return Convolution(s, shape, geometry, bias, *more, native.active_path())
    backend, interpret = pallas.target()
    if path == "pallas" or (path is None and not interpret):
        held = pallas.prepared(schedule.dense(s), geometry, shape, most=0.5 if path is None else 1.0)
        if not isinstance(held, str):
            return Convolution(s, shape, geometry, bias, *more, f"pallas/{'interpret' if interpret else backend}", held)
        if path == "pallas":
            raise ValueError(f"the Pallas path does not run: {held}")
    return Convolution(s, shape, geometry, bias, *more, "xla")
