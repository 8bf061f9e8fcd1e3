"""`reconstruct`: a trained network and a few hundred examples, compressed in minutes, layer by layer.

The layers are taken in the order in which the network runs. Two networks run side by side over the calibration
examples, the dense one and the compressed one as far as it is done. For each constrained leaf the solver finds weights
in its set whose outputs, for the inputs that the *compressed* network gives it, are nearest to the outputs of the
*dense* network; then both networks run on to the next.
"""

import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from compressx._harden import Hardened, check
from compressx.axes import DEFAULTS, parse
from compressx.capture import CaptureError, Gram, capture
from compressx.capture.capture import axes_and_groups, leaf_of
from compressx.reconstruction.norms import RULES as NORMS
from compressx.reconstruction.norms import Norm
from compressx.reconstruction.report import Layer, Progress, Report, agreement
from compressx.reconstruction.resume import Done, Journal
from compressx.reconstruction.settings import Settings
from compressx.reconstruction.solve import DEFAULT, Solution, solve, solve_joint
from compressx.reconstruction.statistics import move_norm
from compressx.reconstruction.stream import COMPRESSED, DENSE, Stream, whole
from compressx.rules import Bound, Rules, pairs, resolve
from compressx.tree import check_finite

TARGETS = ("block", "dense", "own")


def reconstruct(
    model: Any,
    params: Any,
    rules: Rules,
    batches: Iterable[Any],
    *,
    target: str = "block",
    norms: str = "match",
    settings: Settings = DEFAULT,
    project_rest: bool = False,
    state: str | os.PathLike[str] | None = None,
    save_every: float = 10.0,
    progress: Progress | None = None,
) -> tuple[Hardened, Report]:
    """Compresses a trained network after training, with a few hundred of its inputs and no labels.

    Args:
      model: a Linen or NNX module (run in evaluation mode), or any `f(params, x)`.
      params: its pytree of arrays; running statistics of batch normalisation among them where it has any.
      rules: as for `harden`.
      batches: calibration inputs x, of training data. Their activations between two layers are held for all batches.
      target: what a layer aims at. "block": the dense network's output, at the end of a residual block that of the
        block, so that the last layer also corrects the error of the shortcut; "dense": the layer's own dense output;
        "own": nothing is sequential, each layer aims at its own weights on the dense network's inputs.
      norms: running statistics of batch normalisation, wherever its input has changed: "match" the moments of the dense
        network, "estimate" them anew on the examples, or "keep" the old ones. Layers with a bias and no normalisation
        behind them have their mean output restored by the bias, unless it is "keep".
      settings: of the layer solver.
      project_rest: project constrained leaves that no product reads (a table, a bias), instead of refusing them.
      state: a file into which the leaves that are done are written on the way. A further call with the same network,
        rules, settings and batches continues behind them and ends with the same bits; the file stays.
      save_every: seconds between two writes.
      progress: called behind every leaf with its number, how many there are, and its `Layer`.

    Returns:
      What `harden` returns, every rule satisfied exactly, with the new statistics and biases among the parameters; and
      a `Report`. The same input gives the same bits.

    Raises:
      CaptureError: no product reads a constrained leaf, or not in a way that can be reconstructed; an input of a layer
        is not finite.
      StateError: the file is of another network, other batches, or other rules or settings.
      ValueError: a weight is not finite; the rules do not fit; a rule reads the axes of a leaf otherwise than the
        network does.

    Warns:
      TooFewRows: a layer has more inputs than there are rows to tell them apart.

    Source: the dense target for compressed inputs: Y. Arai, Y. Ichikawa, "Quantization Error Propagation", 2025; the
    block's target with any set: ours.

    Example:
      >>> def network(w, x):
      ...     return jax.nn.relu(x @ w["a"]) @ w["b"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> w = {"a": jax.random.normal(keys[0], (8, 16)), "b": jax.random.normal(keys[1], (16, 4))}
      >>> rules = [(".*", compressx.n_of_m(2, 4))]
      >>> hard, report = compressx.reconstruct(network, w, rules, [jax.random.normal(keys[2], (256, 8))])
      >>> compressx.check(hard, rules)
      >>> [layer.path for layer in report.layers], report.agreement > 0.5
      (['a', 'b'], True)
    """
    started = time.perf_counter()
    for name, value, allowed in (("target", target, TARGETS), ("norms", norms, NORMS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    rules = pairs(rules)
    bound = resolve(rules, params)
    if not bound:
        raise ValueError("the rules constrain no leaf")
    check_finite(params)
    examples = list(batches)
    if not examples:
        raise CaptureError("there is no batch of calibration inputs")
    run = _Run(model, params, bound, examples, target, norms, settings, project_rest, progress)
    task = f"{[(b.name, str(b.constraint), str(b.axes)) for b in bound]} {target} {norms} {settings}"
    run.journal = Journal(state, run.program, run.stream.weights[DENSE], task, examples, save_every)
    hard = run.all()
    check(hard, rules)
    same, output_error = agreement(run.stream)
    names = run.program.paths
    moved = tuple(names[norm.mean] for norm in run.moved)
    biases = tuple(names[leaf] for leaf in run.biased)
    seconds = time.perf_counter() - started
    return hard, Report(tuple(run.layers), moved, biases, same, output_error, seconds)


class _Run:
    """One reconstruction."""

    def __init__(
        self,
        model: Any,
        params: Any,
        bound: Sequence[Bound],
        examples: Sequence[Any],
        target: str,
        rule: str,
        settings: Settings,
        project_rest: bool,
        progress: Progress | None,
    ) -> None:
        self.model, self.params, self.bound, self.examples = model, params, bound, examples
        self.target, self.rule, self.settings, self.progress = target, rule, settings, progress
        self.leaves, self.treedef = jax.tree.flatten(params)
        self.structures: dict[str, tuple[Any, ...]] = {}
        self.layers: list[Layer] = []
        self.moved: list[Norm] = []
        self.biased: list[int] = []
        paths = [path for b in bound for path in b.paths]
        self.stream = Stream(model, params, examples, paths, target == "block")
        self.program, self.uses = self.stream.network
        self.total = len(paths)
        self.rest = [b for b in bound if not b.constraint.joint and not self._readable(b, project_rest)]
        for b in bound:
            if b not in self.rest:
                for path in b.paths:
                    if self._read(path) or not b.constraint.joint:
                        self._agree_on_axes(b, path)
        joint = [b for b in bound if b.constraint.joint]
        self.single = [b for b in bound if not b.constraint.joint and b not in self.rest]
        static = [b for b in self.single if target == "own" or len(self._scopes(b.paths[0])) > 1]
        wanted = [p for b in joint for p in b.paths if self._read(p)] + [b.paths[0] for b in static]
        self.grams: dict[str, Gram] = capture(model, params, examples, wanted) if wanted else {}
        self.joint = joint
        self.journal: Journal

    def _scopes(self, path: str) -> list[tuple[int, ...]]:
        return self.uses.scopes(self.program.paths.index(path))

    def _read(self, path: str) -> bool:
        return bool(self._scopes(path)) and self.program.paths.index(path) not in self.uses.refused

    def _readable(self, b: Bound, project_rest: bool) -> bool:
        try:
            leaf_of(self.stream.network, b.paths[0])
        except CaptureError as error:
            if project_rest:
                return False
            raise CaptureError(
                f"{error}. Leave it out by a rule ({b.paths[0]!r}, None) before the one that matches it, or have it "
                "projected: project_rest=True"
            ) from None
        return True

    def _agree_on_axes(self, b: Bound, path: str) -> None:
        """Raises ValueError unless the rule reads the axes of a leaf as the network does."""
        if not self._read(path):
            return
        found, _ = axes_and_groups(self.stream.network, path)
        shape = self.program.shapes[self.program.paths.index(path)]
        words = parse(found)
        said = b.axes.words if b.axes is not None else DEFAULTS.get(len(shape))
        if words is not None and said != words.words:
            held = "says nothing, so it is read as Flax's" if b.axes is None else f"says {str(b.axes)!r}"
            raise ValueError(
                f"{path} {shape}: the network uses its axes as {found!r}, the rule {held}; give the rules the axes, "
                "compressx.with_axes(rules, params, compressx.axes_of(model, params, x))"
            )

    def all(self) -> Hardened:
        for b in self.joint:
            self._jointly(b)
        for b in self.rest:
            self._projected(b)
        at: dict[int, list[Bound]] = {}
        for b in self.single:
            at.setdefault(self._scopes(b.paths[0])[0][0], []).append(b)
        for number in range(len(self.program.ops)):
            for norm in self.stream.norms.get(number, ()):
                if move_norm(self.stream, norm, self.rule):
                    self.moved.append(norm)
            for b in at.get(number, ()):
                self._leaf(b, number)
            self.stream.run(number)
        return Hardened(jax.tree.unflatten(self.treedef, self._whole()), self.structures)

    def _whole(self) -> list[Any]:
        """The leaves of the tree, with those of the compressed network in their positions."""
        new = iter(self.stream.weights[COMPRESSED])
        return [next(new) if hasattr(leaf, "dtype") else leaf for leaf in self.leaves]

    def _set(self, b: Bound, path: str, value: Any, found: Solution | None, error: float, **about: Any) -> None:
        """Puts a solved leaf in its place and notes what became of it."""
        leaf = self.program.paths.index(path)
        self.stream.put(leaf, value)
        made = Layer(
            path,
            str(b.constraint),
            about["inputs"],
            about.get("shortcut", False),
            error,
            found.kept if found else "projection",
            dict(found.tried) if found else {},
            found.iterations if found else 0,
            found.residual if found else 0.0,
            (int(jnp.count_nonzero(value)), int(value.size)),
            time.perf_counter() - about["started"],
        )
        self.layers.append(made)
        if self.progress is not None:
            self.progress(len(self.layers), self.total, made)

    def _projected(self, b: Bound) -> None:
        started = time.perf_counter()
        held = b.take(self.leaves)
        self.structures[b.name] = b.choose(held)
        own = list(self.leaves)
        b.put(own, b.project(held, self.structures[b.name]))
        for path, index in zip(b.paths, b.indices, strict=True):
            before, after = (np.asarray(x, np.float64) for x in (self.leaves[index], own[index]))
            error = float(np.sum((after - before) ** 2) / max(np.sum(before**2), 1e-30))
            self._set(b, path, own[index], None, error, inputs="none", started=started)

    def _jointly(self, b: Bound) -> None:
        started = time.perf_counter()
        held = [self.leaves[i] for i in b.indices]
        grams = [self.grams.get(path) for path in b.paths]
        if all(gram is None for gram in grams):
            self._projected(b)
            return
        found = solve_joint(held, grams, b.constraint, axes=b.axes, settings=self.settings, names=b.paths)
        self.structures[b.name] = found.structure
        for path, w, error in zip(b.paths, found.w, found.errors, strict=True):
            self._set(b, path, w, found, error, inputs="dense" if path in self.grams else "none", started=started)

    def _leaf(self, b: Bound, number: int) -> None:
        started = time.perf_counter()
        path = b.paths[0]
        leaf = self.program.paths.index(path)
        w0 = self.leaves[b.indices[0]]
        known = self.journal.known(b, b.take(self.leaves))
        if known is not None:
            self._restore(b, leaf, known)
            return
        inputs, aim, corrected, stats = "dense", None, None, None
        if path in self.grams:
            gram = self.grams[path]
        else:
            stats = self.stream.both(leaf, number)
            gram, aim, corrected = self._problem(leaf, w0, stats)
            inputs = "compressed"
        found = solve(
            w0, gram, b.constraint, axes=b.axes, target=aim, settings=self.settings, name=f"{path} {w0.shape}"
        )
        self.structures[b.name] = found.structure
        about = {"inputs": inputs, "shortcut": corrected is not None, "started": started}
        self._set(b, path, found.w, found, found.error, **about)
        bias = None
        if self.rule != "keep" and self._takes_mean(leaf):
            bias = self._bias(leaf, w0, found.w, stats or self.stream.both(leaf, number), corrected)
        self.journal.add(Done(self.layers[-1]._asdict(), found.w, found.structure, bias))

    def _restore(self, b: Bound, leaf: int, known: Done) -> None:
        """Puts a leaf in its place that an earlier call has done."""
        self.structures[b.name] = known.structure
        self.stream.put(leaf, known.w)
        if known.bias is not None:
            bias = self.stream.tails[leaf].bias
            assert bias is not None
            self.stream.put(bias, jnp.asarray(known.bias))
            self.biased.append(bias)
        self.layers.append(Layer(**{**known.about, "weights": tuple(known.about["weights"])}))
        if self.progress is not None:
            self.progress(len(self.layers), self.total, self.layers[-1])

    def _problem(
        self, leaf: int, w0: Any, stats: dict[str, NDArray[np.float64]]
    ) -> tuple[Gram, NDArray[np.float64] | None, Any]:
        """The statistics of a leaf, what it aims at (None: its own weights), and the correction of its shortcut."""
        h, c = whole(stats, "h"), whole(stats, "c")
        h = (h + h.transpose(0, 2, 1)) / 2
        gram = Gram(h, int(stats["rows"].min()), whole(stats, "sum"))
        corrected = self.stream.correction(leaf) if self.target == "block" else None
        if corrected is None and np.array_equal(stats["h"], stats["c"]):
            return gram, None, None
        own = np.asarray(self.uses.views[leaf].to(jnp.asarray(w0)), np.float64)
        diagonal = np.einsum("gpp->gp", h).mean(1)
        ridge = self.settings.damp * np.where(diagonal > 0, diagonal, max(float(diagonal.mean()), 1e-30))
        right = c @ own + ridge[:, None, None] * own
        if corrected is not None:
            right = right + corrected[0]
        aim = np.linalg.solve(h + ridge[:, None, None] * np.eye(h.shape[1]), right)
        return gram, np.asarray(aim, np.float64), corrected

    def _takes_mean(self, leaf: int) -> bool:
        """Whether a bias of its own, and no batch normalisation, follows a leaf that is one matrix."""
        tail = self.stream.tails.get(leaf)
        if tail is None or tail.bias is None or self.uses.views[leaf].groups > 1:
            return False
        normed = {norm.value for held in self.stream.norms.values() for norm in held}
        shared = sum(other.bias == tail.bias for other in self.stream.tails.values())
        constrained = any(self.program.paths[tail.bias] in b.paths for b in self.bound)
        return not (normed & set(tail.values) or shared > 1 or constrained)

    def _bias(self, leaf: int, w0: Any, w: Any, stats: dict[str, NDArray[np.float64]], corrected: Any) -> Any:
        """The bias of a layer without batch normalisation takes what its mean output has lost; it is returned."""
        tail = self.stream.tails[leaf]
        assert tail.bias is not None
        view = self.uses.views[leaf]
        dense, compressed = (np.asarray(view.to(jnp.asarray(x)), np.float64) for x in (w0, w))
        lost = np.einsum("gp,gpf->gf", whole(stats, "sum_dense"), dense)
        lost -= np.einsum("gp,gpf->gf", whole(stats, "sum"), compressed)
        if corrected is not None:
            lost += corrected[1]
        bias = self.stream.weights[COMPRESSED][tail.bias]
        if bias.size != lost.size:
            return None
        new = bias + jnp.asarray(lost.reshape(bias.shape), bias.dtype)
        self.stream.put(tail.bias, new)
        self.biased.append(tail.bias)
        return new
