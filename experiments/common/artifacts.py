"""What a finished run leaves in its work directory: the compressed model, the plots, the page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from compressx import formats
from compressx._harden import outside
from compressx.rules import Rules, resolve
from compressx.tree import paths
from experiments.common.report import html, metrics, run
from experiments.common.report.layers import Layer
from experiments.common.training import Weights

MODEL = "compressed.safetensors"
RULES = "rules.json"


class Stored(NamedTuple):
    """A compressed model as it lies in its file.

    Attributes:
      saved: the file's content, read back.
      layers: a row for every leaf.
      rate: the `rate` section of a summary.
      size: the `bytes` section.
      violations: entries of the stored weights outside their sets; None where nothing is constrained.
    """

    saved: formats.SavedModel
    layers: list[Layer]
    rate: dict[str, float | None]
    size: dict[str, int]
    violations: int | None


def save(
    path: Path,
    weights: Weights,
    rules: Rules | None,
    model: Mapping[str, Any],
    extra: Mapping[str, Any],
    schedule: Mapping[str, Any] | None = None,
) -> Stored:
    """Writes the compressed model, reads it back, and measures what was read.

    Beside the run's own model its rules are written as a file that `--config.rules` reads.

    Args:
      path: the file.
      weights: of the model, with their structure.
      rules: that they satisfy; None where nothing is constrained.
      model: the network, see `formats.save_model`.
      extra: facts to keep in the file.
      schedule: by which ADMM reached the rules, see `phases.schedule`.

    Raises:
      CompressedFileError, OSError: the file cannot be written or read.
      RuntimeError: what was read is not what was written, bit for bit.
    """
    variables = {**weights.params, **weights.batch_stats}
    formats.save_model(path, variables, rules or (), weights.structure if rules else None, model=model, extra=extra)
    stored = read(path)
    for name, a, b in zip(
        paths(variables), jax.tree.leaves(variables), jax.tree.leaves(stored.saved.params), strict=True
    ):
        if np.asarray(a).tobytes() != np.asarray(b).tobytes():
            raise RuntimeError(f"{path}: {name} came back with other bits; this is a bug of the format")
    if rules and path.name == MODEL:
        formats.write_rules(path.with_name(RULES), rules, schedule)
    return stored


def read(path: Path) -> Stored:
    """A compressed model from its file, with every figure taken from the stored arrays.

    `rate.all_weights` counts every leaf below `params/`; leaves without a constraint (biases, ...) count as kept whole.
    """
    saved = formats.load_model(path)
    names, leaves = paths(saved.params), jax.tree.leaves(saved.params)
    bound = resolve(saved.rules, saved.params) if saved.rules else ()
    held = {p: str(b.constraint) for b in bound for p in b.paths}
    layers = [
        Layer(
            path=name,
            shape=tuple(w.shape),
            constraint=held.get(name),
            kept=int(np.count_nonzero(w)),
            total=w.size,
            bytes_dense=w.nbytes,
            bytes_packed=formats.nbytes(saved.packed[name]),
        )
        for name, w in zip(names, leaves, strict=True)
    ]
    trained = [row for row in layers if row.path.startswith("params/")]
    violations = None
    if bound:
        violations = sum(outside(saved.params, saved.rules, saved.structures).values())
    return Stored(
        saved=saved,
        layers=layers,
        rate={
            "constrained_weights": _ratio([row for row in trained if row.path in held]),
            "all_weights": _ratio([row if row.path in held else row._replace(kept=row.total) for row in trained]),
            "bytes": saved.sizes.dense / saved.sizes.packed,
        },
        size={"dense": saved.sizes.dense, "packed": saved.sizes.packed},
        violations=violations,
    )


def _ratio(rows: Sequence[Layer]) -> float | None:
    kept = sum(row.kept for row in rows)
    return sum(row.total for row in rows) / kept if kept else None


def constrained(params: Any, rules: Rules) -> dict[str, np.ndarray]:
    """Path -> weight of the constrained leaves."""
    names, leaves = paths(params), jax.tree.leaves(params)
    return {names[i]: np.asarray(leaves[i]) for b in resolve(rules, params) for i in b.indices}


def pictures(workdir: Path, before: Any, after: Any, rules: Rules | None) -> list[html.Picture]:
    """The standard plots of an image classifier's run, as PNGs in the work directory."""
    return run.standard_pictures(
        workdir,
        metrics.read_metrics(workdir / "metrics.jsonl"),
        constrained(before, rules) if rules else None,
        constrained(after, rules) if rules else None,
        metric_curves={"test": "accuracy", "validation": "validation_accuracy", "train": "train_accuracy"},
        loss_curves={"test": "test_loss", "train": "loss"},
    )


def links(workdir: Path) -> list[tuple[str, str]]:
    """The files that a page points to."""
    names = {
        "summary": "summary.json",
        "configuration": "config.json",
        "metrics": "metrics.jsonl",
        "compressed model": MODEL,
        "rules": RULES,
    }
    return [(what, name) for what, name in names.items() if name == "summary.json" or (workdir / name).exists()]
