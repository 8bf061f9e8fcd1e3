"""How good and how large the networks of `experiments.pneumonia` are: scores, compaction, times."""

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import compressx
from compressx import compaction
from compressx.compaction import gathered
from compressx.compaction.cost import LayerCost
from compressx.compaction.device import estimate
from compressx.formats.base import index_dtype
from compressx.kernels import native
from compressx.native.convolve import convolve
from compressx.timing import interleaved
from experiments.common.data import batches
from experiments.pneumonia import detection
from experiments.pneumonia.data import Task
from experiments.pneumonia.detection import screening
from experiments.pneumonia.detection.score import Found
from experiments.pneumonia.detection.task import find_all

SPECIFICITY = 0.9


class Scored(NamedTuple):
    """What a network achieves.

    Attributes:
      facts: all figures, for the summary.
      images: float64 `[n]`, of every test image: its challenge score, NaN where it does not count; without boxes the
        probability.
    """

    facts: dict[str, Any]
    images: np.ndarray


class Judge:
    """Scores networks of one architecture on one task; each prediction program is compiled once."""

    def __init__(self, task: Task, model: Any, batch: int) -> None:
        self.task, self.batch = task, batch
        if task.geometry is not None:
            self._find = detection.predictor(model.apply, task.prepare, task.geometry)
        else:
            self._logits = jax.jit(lambda v, x: jax.nn.softmax(model.apply(v, task.prepare(x)))[:, 1])

    def found(self, variables: Any, part: dict[str, np.ndarray]) -> list[Found]:
        """Detections beside true boxes, for every image of a split."""
        return find_all(self._find, variables, part, self.batch)

    def score(self, variables: Any, threshold: float | None = None) -> Scored:
        """All figures of a network; numbers that do not exist (of a split without positives) are None.

        Args:
          variables: of the network, on the host or a device.
          threshold: confidence above which boxes count; None: the best one on the validation images.
        """
        variables = jax.tree.map(jnp.asarray, variables)
        judged = self.task.judged["test"]
        if self.task.geometry is None:
            probability = self._probabilities(variables, self.task.test)
            out: dict[str, Any] = {"threshold": 0.5}
            each = probability
            out["accuracy"] = float(((probability >= 0.5) == judged.positive.astype(bool)).mean())
        else:
            if threshold is None:
                mine = self.found(variables, self.task.validation)
                boxed = self.task.judged["validation"].boxed
                threshold, value = detection.choose_threshold([f for f, b in zip(mine, boxed, strict=True) if b])
            else:
                value = None
            every = self.found(variables, self.task.test)
            images = [f for f, b in zip(every, judged.boxed, strict=True) if b]
            score = detection.challenge_score(images, threshold)
            each = np.full(len(every), np.nan)
            each[judged.boxed] = score.each
            probability = np.array([f.scores.max(initial=0.0) for f in every])
            out = {
                "threshold": threshold,
                "validation_score": value,
                "challenge_score": score.value,
                "images_scored": score.images,
                "map_50": detection.average_precision(images, 0.5),
                "map_40_75": detection.mean_average_precision(images),
            }
        interval = screening.auc_interval(judged.positive, probability, judged.patient)
        out |= {"auc": interval.value, "auc_low": interval.low, "auc_high": interval.high}
        calibration = screening.reliability(judged.positive, np.clip(probability, 0, 1))
        out["calibration_error"] = calibration.error
        if 0 < judged.positive.mean() < 1:
            point = screening.sensitivity_at(judged.positive, probability, SPECIFICITY)
            out |= {"sensitivity": point.sensitivity, "at_specificity": point.specificity}
        out["reliability"] = {k: getattr(calibration, k).tolist() for k in ("predicted", "observed", "count")}
        return Scored({k: None if isinstance(v, float) and np.isnan(v) else v for k, v in out.items()}, each)

    def minus(self, a: Scored, b: Scored) -> dict[str, float | None]:
        """How much larger a's headline figure is than b's, with the ends of its bootstrap interval over patients."""
        judged = self.task.judged["test"]

        def figure(scored: Scored, rows: np.ndarray) -> float:
            values = scored.images[rows]
            if self.task.geometry is None:
                return screening.auc(judged.positive[rows], values)
            return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")

        found = screening.bootstrap(lambda rows: figure(a, rows) - figure(b, rows), judged.patient)
        ends = {"difference": found.value, "low": found.low, "high": found.high}
        return {k: None if np.isnan(v) else v for k, v in ends.items()}

    def _probabilities(self, variables: Any, part: dict[str, np.ndarray]) -> np.ndarray:
        n = len(part["labels"])
        rows, valid = batches.cover(n, min(self.batch, n))
        pairs = zip(rows, valid, strict=True)
        parts = [np.asarray(self._logits(variables, jnp.asarray(part["inputs"][r])))[v] for r, v in pairs]
        return np.concatenate(parts).astype(np.float64)


class Size(NamedTuple):
    """What a network takes.

    Attributes:
      layers: its convolutions and matrices.
      facts: sums over them, for the summary.
      small: the compact network; None for the dense one.
      packed: its variables with unused positions left out, and those positions.
    """

    layers: list[LayerCost]
    facts: dict[str, Any]
    small: compaction.Compact | None = None
    packed: tuple[Any, dict[str, np.ndarray]] | None = None


def _inputs(task: Task) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *task.shape), jnp.float32)


def _facts(layers: list[LayerCost], peak: int, variables: Any, positions: dict[str, np.ndarray]) -> dict[str, Any]:
    """Sums; `bytes` is of all arrays as stored: unused positions left out, the used ones listed (`index_bytes`)."""
    convolutions = [c for c in layers if len(c.shape) == 4]
    guess = estimate(layers)
    extents = {c.path: int(np.prod(c.shape[:-1])) for c in layers}
    index = sum(len(used) * index_dtype(extents[path]).itemsize for path, used in positions.items())
    return {
        "weights": sum(c.weights for c in convolutions),
        "macs": sum(c.macs for c in layers),
        "bytes": sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(variables)) + index,
        "index_bytes": index,
        "peak_activation_bytes": peak,
        "tx2_estimate": {"milliseconds": 1e3 * guess.seconds, "frames": guess.frames, "joules": guess.joules},
    }


def whole(model: Any, variables: Any, task: Task) -> Size:
    """The dense network."""
    x = _inputs(task)
    layers = compaction.costs(model, variables, x)
    return Size(layers, _facts(layers, compaction.peak_bytes(model, variables, x), variables, {}))


def compacted(model: Any, variables: Any, task: Task) -> Size:
    """A pruned network, compacted, and how far its outputs are from the masked one's on test images."""
    x = _inputs(task)
    variables = jax.tree.map(jnp.asarray, variables)
    small = compaction.compact(model, variables, x)
    packed = compaction.gather(small.variables)
    layers = compaction.costs(small.apply, small.variables, x, used=packed[1])
    images = task.prepare(jnp.asarray(task.test["inputs"][:4]))
    masked = jax.jit(lambda v, i: model.apply(v, i))(variables, images)
    ours = jax.jit(small.apply)(small.variables, images)
    gaps = [float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(masked), jax.tree.leaves(ours), strict=True)]
    facts = _facts(layers, compaction.peak_bytes(small.apply, small.variables, x), *packed)
    facts["masked_minus_compacted"] = max(gaps)
    return Size(layers, facts, small, packed)


# -- points side by side -----------------------------------------------------------------------------------------------


def combined_minus(points: Sequence[Any], judge: Judge, scored: Mapping[str, Scored]) -> list[dict[str, Any]]:
    """At every rate at which ADMM was run for "combined" and for another kind: how much better the former is."""
    admm = {(p.rate, p.kind): p.name for p in points if p.method == "admm"}
    return [
        {"rate": rate, "than": kind, **judge.minus(scored[admm[rate, "combined"]], scored[name])}
        for (rate, kind), name in sorted(admm.items())
        if kind != "combined" and (rate, "combined") in admm
    ]


def rows(block: Mapping[str, Any], metric: str, seed: int) -> list[dict[str, Any]]:
    """The networks of a run as one list, a flat entry each: what the tables of results are made from.

    Args:
      block: of the summary, see `pneumonia.conclude`.
      metric: the name of the headline figure, here `score`.
      seed: of the run.
    """
    same_budget = {"scores": block["same_budget"], "size": block["dense"]["size"]}
    dense = {"kind": "dense", "rate": 1.0, "rate_kept": 1.0}
    entries = [{**dense, "method": "before compression", **block["dense"]}]
    if block["same_budget"]:
        entries.append({**dense, "method": "same budget", **same_budget})
    entries += block["points"].values()
    out = []
    for entry in entries:
        scores, size = entry["scores"], entry["size"]
        row = {k: entry[k] for k in ("kind", "rate", "method", "rate_kept")}
        row |= {"seed": seed, "score": scores[metric], "latency_ms": entry.get("latency_ms")}
        row["minus_dense"] = entry.get("minus_dense", {}).get("difference")
        row |= {k: scores.get(k) for k in ("map_50", "map_40_75", "auc")}
        row |= {k: size[k] for k in ("weights", "macs", "bytes", "index_bytes")}
        out.append(row)
    return out


# -- times -------------------------------------------------------------------------------------------------------------


class LayerTime(NamedTuple):
    """Milliseconds of one layer alone: dense, the smaller kernel by plain convolution, and by gathered product."""

    path: str
    dense: float
    small: float | None
    gathered: float | None


class Times(NamedTuple):
    """Medians in milliseconds for one image, each of the fastest way to run the network.

    Attributes:
      dense: the dense network.
      points: name -> the compact network.
      layers: of the first point, by layer.
      facts: for the summary.
    """

    dense: float
    points: dict[str, float]
    layers: list[LayerTime]
    facts: dict[str, Any]


def _medians(calls: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Median milliseconds of each call."""
    return {name: 1e3 * statistics.median(spent) for name, spent in interleaved(calls, rounds).items()}


def times(model: Any, dense: Any, sizes: Mapping[str, Size], task: Task, rounds: int) -> Times:
    """Measures the dense network and compact ones, whole, in every way that there is to run them; the fastest counts.

    Args:
      model: the network.
      dense: its dense variables.
      sizes: compact networks; the first is measured by layer too, and mixed: gathered where that was faster.
      task: the images.
      rounds: of the measurement; all networks take turns in each.
    """
    head, x = next(iter(sizes)), jnp.zeros((1, *task.shape), jnp.float32)
    rows = _by_layer(model, dense, sizes[head], task, rounds)
    better = {r.path for r in rows if r.gathered is not None and r.small is not None and r.gathered < r.small}
    dense = jax.tree.map(jnp.asarray, dense)
    calls = {("dense", way): call for way, call in _ways(model.apply, dense, x).items()}
    for name, size in sizes.items():
        assert size.small is not None and size.packed is not None
        calls |= {(name, way): call for way, call in _ways(size.small.apply, size.small.variables, x).items()}
        gathers = {"gathered": size.packed}
        if name == head:
            gathers["mixed"] = compaction.gather(size.small.variables, lambda path, kernel: path in better)
        for way, (variables, used) in gathers.items():
            if used:
                f = jax.jit(compaction.smaller(model, dense, size.small.dead, positions=used))
                calls[name, way] = functools.partial(f, variables, x)
    got = _medians(calls, rounds)
    facts: dict[str, Any] = {}
    for name in ("dense", *sizes):
        mine = {way: value for (network, way), value in got.items() if network == name}
        facts[name] = {"milliseconds": mine, "best": min(mine, key=mine.__getitem__)}
    fastest = {name: min(entry["milliseconds"].values()) for name, entry in facts.items()}
    first = {"networks": facts, "gathered_layers": len(better), "rounds": rounds, "batch": 1}
    return Times(fastest.pop("dense"), fastest, rows, first)


def _ways(apply: Callable[[Any, Any], Any], variables: Any, x: jax.Array) -> dict[str, Callable[[], Any]]:
    """A network by plain convolutions, and by this library's own kernels where they run."""
    ways: dict[str, Callable[[], Any]] = {}
    ways["plain"] = functools.partial(jax.jit(lambda v, i: apply(v, i)), variables, x)
    if native.available():
        for way, threads in (("native", 0), ("native_1_thread", 1)):  # small layers are not worth a second thread
            f, arrays = compressx.compile(apply, variables, threads=threads).lower(x)
            ways[way] = functools.partial(f, arrays, x)
    return ways


def _by_layer(model: Any, dense: Any, size: Size, task: Task, rounds: int) -> list[LayerTime]:
    assert size.packed is not None
    positions, cache = size.packed[1], dict[Any, float]()
    after = {c.path: c for c in size.layers}
    rows = []
    for layer in compaction.costs(model, dense, _inputs(task)):
        mine, used = after.get(layer.path), positions.get(layer.path)
        rows.append(
            LayerTime(
                layer.path,
                _layer(layer, None, rounds, cache),
                None if mine is None else _layer(mine, None, rounds, cache),
                None if mine is None or used is None else _layer(mine, used, rounds, cache),
            )
        )
    return rows


def _layer(layer: LayerCost, used: np.ndarray | None, rounds: int, cache: dict[Any, float]) -> float:
    """Median milliseconds of one layer on its own."""
    key = (layer.shape, layer.image, layer.stride, None if used is None else used.tobytes())
    if key in cache:
        return cache[key]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, *layer.image), np.float32))
    if len(layer.shape) == 2:
        w = jnp.asarray(rng.standard_normal(layer.shape, np.float32))
        run = jax.jit(jnp.dot)
    else:
        pad, stride = layer.shape[0] // 2, (layer.stride, layer.stride)
        pads = ((pad, pad), (pad, pad))
        if used is None:
            w = jnp.asarray(rng.standard_normal(layer.shape, np.float32))
            numbers = ("NHWC", "HWIO", "NHWC")
            run = jax.jit(lambda x, w: convolve(x, w, stride, pads, dimension_numbers=numbers))
        else:
            w = jnp.asarray(rng.standard_normal((len(used), layer.shape[3]), np.float32))
            window = layer.shape[:3]
            run = jax.jit(lambda x, w: gathered.gathered_conv(x, w, used, window, stride, pads))
    cache[key] = _medians({"it": lambda: run(x, w)}, rounds)["it"]
    return cache[key]
