"""What else is measured of a compressed image classifier: its operations, and how it uses its patterns."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressx import compaction, formats
from compressx.constraints import library as lib
from compressx.constraints import library_use
from compressx.kernels import unified
from compressx.rules import Rules, resolve
from experiments.cnn import plots as pattern_plots
from experiments.common.report import format as fmt
from experiments.common.report import html, metrics
from experiments.common.training import Weights
from experiments.common.training.libraries import libraries

_TIED = ("unify", "unify_and_prune")


Content = list[str | html.Picture | html.Table]


def measure(
    workdir: Path, model: Any, dense: Any, result: Weights, rules: Rules, shape: tuple[int, ...]
) -> tuple[dict[str, Any], list[tuple[str, Content]]]:
    """The entries of a summary's own block, `operations` and `patterns` (where there is a library), and their sections.

    Args:
      workdir: of the run; pictures go there.
      model: the network.
      dense: its parameters before compression.
      result: its weights after it, inside their sets.
      rules: the sets.
      shape: of an image.
    """
    counted, used = operations(model, result, rules, shape), patterns(dense, result, rules)
    block: dict[str, Any] = {"operations": counted}
    sections: list[tuple[str, Content]] = [("Operations of one image", [_operations_table(counted)])]
    if used:
        block["patterns"] = used
        sections.append(("Patterns", _pattern_content(workdir, used)))
    return block, sections


def operations(model: Any, result: Weights, rules: Rules, shape: tuple[int, ...]) -> dict[str, Any]:
    """Multiplications and additions for one image, and those of the dense network.

    A weight costs a multiplication and an addition wherever it is used, a zero neither; under `unify` a block costs one
    multiplication for each output and signed additions (`kernels.unified.counts`). Biases and normalisation are left
    out.

    Args:
      model: the network.
      result: its weights, inside their sets.
      rules: the sets.
      shape: of an image.

    Returns:
      `multiplications`, `additions`, `dense` (of each), `rate` (dense multiplications over those left), and `layers`:
      path -> [multiplications, additions, dense].
    """
    variables = {**result.params, **result.batch_stats}
    bound = {p: b for b in resolve(rules, result.params) for p in b.paths}
    weights = {p: np.asarray(w) for b in bound.values() for p, w in _leaves(b, result.params)}
    layers: dict[str, list[int]] = {}
    for cost in compaction.costs(model, variables, jax.ShapeDtypeStruct((1, *shape), jnp.float32)):
        each = (cost.weights, cost.weights)
        if cost.path in bound:
            b, w = bound[cost.path], weights[cost.path]
            each = (int(np.count_nonzero(w)),) * 2
            if any(part.spec["kind"] in _TIED for part in b.constraint.sets):
                counts = unified.counts(formats.pack(w, b.constraint, result.structure[b.name], format="unified"))
                each = (counts.multiplications, counts.additions)
        layers[cost.path] = [each[0] * cost.outputs, each[1] * cost.outputs, cost.macs]
    multiplications, additions, dense = (sum(column) for column in zip(*layers.values(), strict=True))
    return {
        "multiplications": multiplications,
        "additions": additions,
        "dense": dense,
        "rate": dense / multiplications,
        "layers": layers,
    }


def _leaves(bound: Any, params: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree.leaves(params)
    return [(p, leaves[i]) for p, i in zip(bound.paths, bound.indices, strict=True)]


def patterns(dense: Any, result: Weights, rules: Rules) -> list[dict[str, Any]]:
    """How the network uses each of its pattern libraries, and how the dense one used all masks it was chosen from.

    Args:
      dense: parameters before compression.
      result: the weights after it.
      rules: the sets.

    Returns:
      For every library: `name` of the leaf or the rule; `dense` and `final`, a `library_use.Use` each (`dense` over the
      natural masks for a natural library, else over all of so many taps; null where those are too many to try);
      `published`, masks of the final library that the paper's authors released; `changed`, the share of kernels whose
      mask in this library differs from the dense kernel's; `shapes`, the shares of Gaussian blocks, T shapes and others
      by layer, for 4 of 3x3 taps.
    """
    out = []
    for b, spec, structure in libraries(result.params, rules, result.structure):
        before, after = _leaves(b, dense), _leaves(b, result.params)
        old, new = [w for _, w in before], [w for _, w in after]
        kernel, entries = (spec["kernel"][0], spec["kernel"][1]), spec["entries"]
        small = kernel == (3, 3) and entries == 4
        candidates = _candidates(spec["library"] == "natural", entries, kernel)
        use = library_use.use_of(new, structure.masks, structure.live)
        out.append(
            {
                "name": b.name,
                "kernel": list(kernel),
                "dense": None if candidates is None else _plain(library_use.use_of(old, candidates)),
                "final": _plain(use),
                "published": library_use.published(use.masks) if small else None,
                "changed": library_use.changed(old, new, structure),
                "shapes": {p: library_use.shape_shares(w, structure) for p, w in after} if small else {},
            }
        )
    return out


def _candidates(natural: bool, entries: int, kernel: tuple[int, int]) -> np.ndarray | None:
    if math.comb(kernel[0] * kernel[1] - natural, entries - natural) > lib.MAX_MASKS:
        return None
    return lib.enumerate_masks(entries, kernel, natural)


def _plain(use: library_use.Use) -> dict[str, Any]:
    return use._asdict() | {"coverage": {str(k): share for k, share in use.coverage.items()}}


def _operations_table(counted: dict[str, Any]) -> html.Table:
    """By layer."""
    rows = [(p, *(fmt.count(n) for n in each)) for p, each in counted["layers"].items()]
    total = [counted[k] for k in ("multiplications", "additions", "dense")]
    rows.append(("all layers", *(fmt.count(n) for n in total)))
    return html.Table(("layer", "multiplications", "additions", "of each, dense"), rows, (False, True, True, True))


def _pattern_content(workdir: Path, used: list[dict[str, Any]]) -> Content:
    """The libraries on the page: what is left, how it was reached, which shapes; pictures of the first few."""
    rows = []
    for u in used:
        for when, use in (("dense network", u["dense"]), ("compressed", u["final"])):
            if use is not None:
                cover = [fmt.percent(use["coverage"][str(k)]) for k in library_use.TOP]
                rows.append((u["name"], when, str(len(use["masks"])), f"{use['entropy']:.2f}", *cover))
    header = ("library", "kernels of", "masks", "entropy, bits", *(f"top {k}" for k in library_use.TOP))
    out: Content = [html.Table(header, rows, (False, False, *[True] * 5))]
    for number, u in enumerate(used[:4]):
        name = "library.png" if number == 0 else f"library_{number}.png"
        path = pattern_plots.library(
            workdir / name, u["final"]["masks"], u["final"]["counts"], (u["kernel"][0], u["kernel"][1])
        )
        words = f"{u['name']}: {fmt.percent(u['changed'])} of the kernels have another mask than in the dense network."
        if u["published"] is not None:
            words += f" {u['published']} of the masks are among the 12 that the paper's authors released."
        out.append(html.Picture(path, "Masks, the most used first", words))
    shapes = [(p, *(fmt.percent(s) for s in each.values())) for u in used for p, each in u["shapes"].items()]
    if shapes:
        header = ("layer", "2x2 blocks with the centre", "plus less an arm", "others")
        out.append(html.Table(header, shapes, (False, True, True, True)))
    records = metrics.read_metrics(workdir / "metrics.jsonl")
    sizes, entropies, top = (metrics.leaf_series(records, f"library_{k}") for k in ("size", "entropy", "top8"))
    log = [
        (name, f"{step}", f"{size:g}", f"{entropies[name].values[i]:.2f}", fmt.percent(top[name].values[i]))
        for name, curve in list(sizes.items())[:4]
        for i, (step, size) in enumerate(zip(curve.steps, curve.values, strict=True))
    ]
    if log:
        out += ["After every epoch of ADMM:"]
        header = ("library", "step", "masks", "entropy, bits", "top 8")
        out.append(html.Table(header, log, (False, True, True, True, True)))
    return out
