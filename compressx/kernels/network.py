"""Whole networks in compressed form: one call turns a packed model into a jitted function.

    f = compressx.compile(model, compressx.load_model("compressed.safetensors"))
    logits = f(images)

Activations stay in planes from the first convolution to the last; layouts are converted only at the ends and around
operations that have no kernel here. Convolutions run as the plan of each layer says, with their batch normalisation,
bias, residual addition and ReLU inside. Where the native kernels do not run, the same fused steps run on XLA,
on a GPU or TPU with Pallas for the layers whose weights have enough blocks of zeros.
"""

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressx._harden import Hardened
from compressx.formats.base import Packed
from compressx.formats.file import SavedModel
from compressx.kernels import native, pallas, pattern_conv, plans, schedule, tuning
from compressx.kernels.graph import Conv, Other, Pool, Step, steps
from compressx.kernels.grid import Grid, grid, valid, window_source
from compressx.kernels.report import LayerReport, Lines
from compressx.kernels.schedule import Loads, Sparse
from compressx.trace import Program, of_nothing, trace

_MISSING = "there are no native kernels: no compiler, COMPRESSX_NATIVE=off, or not on the CPU"


class Compiled:
    """A network in compressed form, called as `f(x)` with whatever the network takes: an array or a pytree of arrays.

    Specialised once for each shape of the input, at its first call (safe from several threads). No gradient.

    Attributes:
      path: `native/<instruction set>`, `pallas/<gpu, tpu or interpret>` or `xla`. With Pallas, layers that it does not
        support run on XLA: see `layers`.

    Example:
      >>> f = compressx.compile(lambda variables, x: x @ variables["kernel"], {"kernel": jnp.eye(3)}, path="xla")
      >>> type(f).__name__, f.path
      ('Compiled', 'xla')
    """

    def __init__(
        self, model: Any, variables: Any, packed: Mapping[str, Packed], threads: int, tune: bool, path: str | None
    ):
        self._model, self._variables, self._packed = model, variables, packed
        self._threads, self._tune = threads, tune
        backend, interpret = pallas.target()
        if path != "xla" and path != "pallas" and native.available():
            self.path = native.active_path()
        elif path == "pallas" or (path is None and not interpret):
            self.path = f"pallas/{'interpret' if interpret else backend}"
        else:
            self.path = "xla"
        self._why = "path='xla' was asked for" if path == "xla" else _MISSING
        self._most = 1.0 if path == "pallas" else 0.5
        self._ready: dict[tuple[Any, ...], tuple[Callable[..., Any], Any, list[LayerReport]]] = {}
        self._lock = threading.Lock()

    def _specialise(self, x: Any) -> tuple[Callable[..., Any], Any, list[LayerReport]]:
        inputs, treedef = jax.tree.flatten(x)
        key = (treedef, *((tuple(np.shape(leaf)), jnp.result_type(leaf).name) for leaf in inputs))
        with self._lock:
            if key not in self._ready:
                spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf)), x)
                empty = None
                if any(np.shape(leaf)[:1] == (0,) for leaf in inputs):
                    empty = of_nothing(self._model, self._variables, spec)
                    spec = spec if empty is None else jax.tree.map(_one, spec)
                given = (self._packed, self._threads, self._tune, self.path, self._most, self._why)
                with jax.ensure_compile_time_eval():  # also within somebody's jit
                    program = trace(self._model, self._variables, spec)
                    f, arrays, lines = _Builder(program, self._variables, *given).build()
                self._ready[key] = f if empty is None else _nothing(empty), arrays, lines
            return self._ready[key]

    def lower(self, x: Any) -> tuple[Callable[[Any, Any], Any], Any]:
        """The function `g(arrays, x)` for inputs like x and its arrays, to jit, time or export it yourself."""
        f, arrays, _ = self._specialise(x)
        return f, arrays

    def layers(self, x: Any) -> list[LayerReport]:
        """What became of every operation that has parameters, for inputs like x, and why: see `LayerReport`.

        A batch of 0 is not computed at all; its lines are those of a batch of 1.
        """
        return self._specialise(x)[2]

    def __call__(self, x: Any) -> Any:
        """The network's outputs."""
        x = jax.tree.map(_native_order, x)
        f, arrays, _ = self._specialise(x)
        return f(arrays, x)


def compile(
    model: Any,
    weights: Any,
    *,
    threads: int = 0,
    tune: bool = False,
    path: str | None = None,
) -> Compiled:
    """Makes a network executable in compressed form, equal to its masked dense self to float tolerance.

    Args:
      model: a flax module (in evaluation mode, see `trace.function_of`), or any `f(variables, x)`.
      weights: a `SavedModel`, as `load_model` returns it, whose packed leaves are executed as they are stored; or the
        model's variables, a `Hardened` or a concrete pytree, with zeros in place.
      threads: at most so many, 0 for all of XLA's pool.
      tune: measure plans of each layer (kept in a cache) rather than trust the model.
      path: "xla" for the fused steps on XLA, "native", "pallas" (interpreted on a CPU, for every layer that it
        supports), or None for the native path where it runs, else Pallas on a GPU or TPU for the layers half of whose
        blocks or more are zero, else XLA.

    Returns:
      A function of the input, jitted, see `Compiled`.

    Raises:
      ValueError: a model that cannot be called, or a path that does not run here.

    Example:
      >>> f = compressx.compile(lambda variables, x: jnp.tanh(x @ variables["kernel"]), {"kernel": jnp.eye(3)})
      >>> f(jnp.zeros((2, 3))).shape
      (2, 3)
    """
    if isinstance(model, SavedModel):
        named = f" of {model.model['name']!r}" if model.model else ""
        raise ValueError(f"a saved model holds weights{named}, not a network: call compile(model, saved)")
    packed: Mapping[str, Packed] = {}
    variables = weights
    if isinstance(weights, SavedModel):
        variables, packed = weights.params, weights.packed
    elif isinstance(weights, Hardened):
        variables = weights.params
    if path not in (None, "native", "pallas", "xla"):
        raise ValueError(f"no path {path!r}; the paths are native, pallas and xla")
    if path == "native" and not native.available():
        raise ValueError(f"the native path does not run: {_MISSING}")
    return Compiled(model, variables, packed, threads, tune, path)


def _native_order(x: Any) -> Any:
    foreign = isinstance(x, np.ndarray) and not x.dtype.isnative
    return x.astype(x.dtype.newbyteorder("=")) if foreign else x


def _one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A batch of 1 in place of one of 0."""
    return jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) if x.shape[:1] == (0,) else x


def _nothing(outputs: Any) -> Callable[[Any, Any], Any]:
    """The function of a batch of 0."""
    return jax.jit(lambda arrays, x: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), outputs))


class _Groups:
    """Values that must lie on the same cells (union of sets, with what each set needs, and the reach of each value)."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}
        self.extent: dict[int, tuple[int, int]] = {}
        self.gap: dict[int, tuple[int, int]] = {}
        self.reach: dict[int, tuple[int, int]] = {}

    def root(self, v: int) -> int:
        self.parent.setdefault(v, v)
        while self.parent[v] != v:
            v = self.parent[v]
        return v

    def need(self, v: int, extent: tuple[int, int], gap: tuple[int, int], reach: tuple[int, int]) -> None:
        r = self.root(v)
        for table, key, value in ((self.extent, r, extent), (self.gap, r, gap), (self.reach, v, reach)):
            old = table.get(key, (0, 0))
            table[key] = (max(old[0], value[0]), max(old[1], value[1]))

    def join(self, a: int, b: int) -> None:
        a, b = self.root(a), self.root(b)
        if a != b:
            self.parent[b] = a
            self.need(a, self.extent.get(b, (0, 0)), self.gap.get(b, (0, 0)), (0, 0))


class _Builder:
    """Steps to one function: grids first, then a closure for every step."""

    def __init__(
        self,
        program: Program,
        variables: Any,
        packed: Mapping[str, Packed],
        threads: int,
        tune: bool,
        path: str,
        most: float,
        why: str,
    ):
        self.program, self.packed, self.threads, self.tune = program, packed, threads, tune
        self.steps, self.known = steps(program, variables)
        self.isa = path.removeprefix("native/") if path.startswith("native") else None
        self.path, self.most, self.why = path, most, why
        self.arrays: dict[str, Any] = {}
        self.reports = Lines(program, self.known, packed)
        self.groups = _Groups()

    def build(self) -> tuple[Callable[..., Any], Any, list[LayerReport]]:
        images = {s.y for s in self.steps if not isinstance(s, Other)} if self.isa else set()
        if self.isa:
            self._lay_out()
        closures = [self._closure(i, s, images) for i, s in enumerate(self.steps)]
        outputs, known, inputs, treedef = self.program.outputs, self.known, self.program.inputs, self.program.treedef
        grids, threads = self._grids() if self.isa else {}, self.threads

        def forward(arrays: dict[str, Any], x: Any) -> Any:
            dense: dict[int, Any] = dict(zip(inputs, jax.tree.leaves(x), strict=True))
            planes: dict[int, Any] = {}
            env = _Values(dense, planes, grids, threads)
            for closure in closures:
                closure(env, arrays)
            return jax.tree.unflatten(treedef, [known[v] if v in known else env.images(v) for v in outputs])

        arrays = jax.tree.map(jnp.asarray, self.arrays)
        return jax.jit(forward), arrays, self.reports.lines

    def _shape(self, v: int) -> tuple[int, ...]:
        return self.program.shapes[v]

    def _lay_out(self) -> None:
        for s in self.steps:
            if isinstance(s, Other):
                continue
            n, h, w, _ = self._shape(s.x)
            oh, ow = self._shape(s.y)[1:3]
            if isinstance(s, Pool):
                (kh, kw), (rows, columns) = s.window, s.pads
                reach = (max(*rows, kh - 1, 1), max(*columns, kw - 1, 1))
                self.groups.need(s.x, (h, w), (max(*rows, 1), max(*columns, 1)), reach)
                self.groups.need(s.y, (oh, ow), (0, 0), (0, 0))
                continue
            g = s.geometry
            self.groups.need(s.y, g.cover(h, w), g.gap(h, w), (0, 0))
            if g.strides == (1, 1):
                self.groups.need(s.x, (h, w), (0, 0), g.reach())
                self.groups.join(s.x, s.y)
            else:
                self.groups.need(s.x, (h, w), (1, 1), (0, 1))  # a margin, whose first vector is zeros
            if s.residual >= 0:
                self.groups.need(s.residual, (oh, ow), (0, 0), (0, 0))
                self.groups.join(s.residual, s.y)

    def _grid(self, v: int) -> Grid:
        r = self.groups.root(v)
        assert self.isa is not None
        reach = self.groups.reach.get(v, (0, 0))
        base = grid(self._shape(v)[0], *self.groups.extent[r], self.groups.gap[r], reach, native.LANES[self.isa])
        h, w = self._shape(v)[1:3]
        return base._replace(h=h, w=w)

    def _grids(self) -> dict[int, Grid]:
        return {v: self._grid(v) for v in self.groups.parent}

    def _closure(self, number: int, s: Step, images: set[int]) -> Callable[["_Values", dict[str, Any]], None]:
        if isinstance(s, Other):
            self.reports.other(s.op)
            return _other(s)
        if isinstance(s, Pool):
            return self._pool(number, s)
        return self._conv(number, s)

    def _pool(self, number: int, s: Pool) -> Callable[["_Values", dict[str, Any]], None]:
        if self.isa is None:
            dims = ((1, *s.window, 1), (1, *s.strides, 1), ((0, 0), *s.pads, (0, 0)))

            def on_xla(env: "_Values", arrays: dict[str, Any]) -> None:
                env.dense[s.y] = jax.lax.reduce_window(env.images(s.x), -jnp.inf, jax.lax.max, *dims)

            return on_xla
        g, out, name = self._grid(s.x), self._grid(s.y), f"step{number}"
        source = window_source(g, out, s.strides, [(-s.pads[0][0], -s.pads[1][0])])
        self.arrays[name] = {"source": source, "valid": valid(out)}

        def pool(env: "_Values", arrays: dict[str, Any]) -> None:
            a = arrays[name]
            env.planes[s.y] = native.resample(env.plane(s.x), g, out, a["source"], a["valid"], s.window, env.threads)

        return pool

    def _sparse(self, s: Conv) -> tuple[Sparse, bool]:
        """The scaled weights, and whether they come from packed arrays."""
        held = self.packed.get(s.path or "")
        packed = held is not None and held.format in schedule.FKW
        found = schedule.from_fkw(held) if held is not None and packed else schedule.from_weight(s.w)
        scale = s.scale[found.order[found.place]].astype(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            return found._replace(weight=found.weight * scale[:, None]), packed

    def _conv(self, number: int, s: Conv) -> Callable[["_Values", dict[str, Any]], None]:
        n, h, w, cin = self._shape(s.x)
        name, geometry = f"step{number}", s.geometry
        report = self.reports.convolution(s, self._shape(s.x), self._shape(s.y))
        if self.isa is None:
            found = self.why if self.path == "xla" else pallas.prepared(s.w, geometry, (n, h, w, cin), self.most)
            stored = self.reports.stored(report.path)
            # a weight that a scale of 0 makes zero still takes part where its input is NaN: the sums are scaled
            self.arrays[name] = {"w": s.w if isinstance(found, str) else found, "bias": s.bias, "scale": s.scale}
            if isinstance(found, str):
                self.reports.lines.append(report._replace(why=f"XLA runs it: {found}{stored}"))
                multiply: Callable[..., Any] = functools.partial(pattern_conv.xla, precision=s.precision)
            else:
                why = f"Pallas runs it: blocks of zeros are skipped{stored}"
                self.reports.lines.append(report._replace(on=self.path, why=why))
                multiply = pattern_conv.on_blocks

            def dense(env: "_Values", arrays: dict[str, Any]) -> None:
                residual = env.images(s.residual) if s.residual >= 0 else None
                a = arrays[name]
                env.dense[s.y] = multiply(
                    *(env.images(s.x), a["w"], geometry, a["bias"], s.activation, residual, s.residual_after),
                    a["scale"],
                )

            return dense
        (sparse, packed), g, wide, reach = self._sparse(s), self._grid(s.y), self._grid(s.x), geometry.reach()
        strided = geometry.strides != (1, 1)
        phases = pattern_conv.phase_grid(geometry, g, h, w)._replace(margin=reach[0] * g.row + reach[1])
        inside = phases if strided else wide
        if self.tune:
            plan = tuning.tuned(sparse, geometry, g._replace(margin=inside.margin), threads=self.threads)
        else:
            plan = plans.guess(sparse, geometry, g, plans.cores(self.threads))
        ready = pattern_conv.layer(sparse, geometry, g, plan, s.bias, s.activation, inside, s.residual_after, (h, w))
        loads = Loads(*(round(count * g.segment) for count in ready.loads))
        weights = "its packed arrays" if packed else f"its weight{self.reports.stored(report.path)}"
        why = f"the native kernels run it from {weights}"
        report = report._replace(plan=plan, on=f"native/{self.isa}", loads=loads, packed=packed, why=why)
        self.reports.lines.append(report)
        arrays = dict(ready.arrays)
        if strided:
            arrays["source"] = window_source(wide, inside, geometry.strides, geometry.phases())
            arrays["phase_valid"] = valid(inside)
        self.arrays[name] = arrays

        def conv(env: "_Values", arrays: dict[str, Any]) -> None:
            a = arrays[name]
            x = env.plane(s.x)
            if strided:
                x = native.resample(x, wide, inside, a["source"], a["phase_valid"], (1, 1), env.threads)
            residual = env.plane(s.residual) if s.residual >= 0 else None
            env.planes[s.y] = pattern_conv.run(ready.fixed, a, x, residual, env.threads)

        return conv


class _Values:
    """Values of a run, as images, as planes, or both."""

    def __init__(self, dense: dict[int, Any], planes: dict[int, Any], grids: dict[int, Grid], threads: int):
        self.dense, self.planes, self.grids, self.threads = dense, planes, grids, threads

    def images(self, v: int) -> Any:
        if v not in self.dense:
            self.dense[v] = native.from_planes(self.planes[v], self.grids[v], self.threads)
        return self.dense[v]

    def plane(self, v: int) -> Any:
        if v not in self.planes:
            self.planes[v] = native.to_planes(self.dense[v], self.grids[v], self.threads)
        return self.planes[v]


def _other(s: Other) -> Callable[[_Values, dict[str, Any]], None]:
    def run(env: _Values, arrays: dict[str, Any]) -> None:
        values = [s.constants[v] if v in s.constants else env.images(v) for v in s.op.inputs]
        out = s.op.primitive.bind(*values, **s.op.params)
        env.dense |= zip(s.op.outputs, out if s.op.primitive.multiple_results else [out], strict=True)

    return run
