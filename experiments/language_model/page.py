"""What a run of `experiments.language_model` shows beyond the common report: observations, storage, structure."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compressx import formats
from compressx.constraints import bank_balanced
from compressx.constraints.darb import row_sensitivity
from compressx.formats import decoding
from compressx.formats.block_max import row_sizes
from compressx.rules import Rules, resolve
from compressx.tree import paths
from experiments.common import artifacts
from experiments.common.data import text
from experiments.common.data.text import Corpus
from experiments.common.report import format as fmt
from experiments.common.report import html, metrics, plots, run
from experiments.common.training import Phase, Weights
from experiments.common.training.language import language
from experiments.language_model import observations
from experiments.language_model import plots as row_plots

FORMATS = ("block-max", "bitmask", "csr", "csr16", "coo-delta", "bspc", "dense")
BANK = 64  # of the bank-balanced encoding, where the rules name no other
STRUCTURES = {"block_max": "block maxima", "random_place": "a random place", "block": "8x8 blocks", "row": "rows"}


class Scene(NamedTuple):
    """A finished run: the network, the text, the dense weights, what was left, and its file."""

    model: Any
    corpus: Corpus
    dense: Any
    result: Weights
    rules: Rules | None
    stored: artifacts.Stored
    workdir: Path


def examine(scene: Scene, probe: Any) -> dict[str, Any]:
    """The driver's own figures: the observations on the dense network, block sizes, storage, a decoder's work."""
    if scene.rules is None:
        return {}
    return {
        "observations": _observe(scene, probe) if probe.run else None,
        "blocks": _blocks(scene),
        "storage": _storage(scene),
        "decoding": _decoding(scene),
    }


def _matrices(params: Any, rules: Rules) -> dict[str, Any]:
    """Constrained leaves of two axes, by path."""
    return {p: w for p, w in artifacts.constrained(params, rules).items() if w.ndim == 2}


def _observe(scene: Scene, probe: Any) -> dict[str, Any]:
    """Row densities, row sensitivities and what block maxima retain, leaf by leaf of the dense network."""
    assert scene.rules is not None
    density, task = 1.0 / probe.size, language(scene.model)
    assert task.begin is not None
    ids = scene.corpus.validation[: probe.words + 1]
    lanes = min(20, max(1, (len(ids) - 1) // 20))
    batch = {k: jnp.asarray(v) for k, v in text.windows(ids, lanes, (len(ids) - 1) // lanes).items()}
    everything, valid = jax.tree.map(jnp.asarray, scene.dense), jnp.ones(lanes, bool)
    leaves, tree = jax.tree.flatten(everything)

    def loss(leaves: Sequence[Any]) -> Any:
        sums, _ = task.score(jax.tree.unflatten(tree, leaves), task.begin(lanes), batch, valid)  # type: ignore[misc]
        return sums.loss / sums.seen.astype(jnp.float32)

    base = float(jax.jit(loss)(leaves))
    out: dict[str, Any] = {"density": density, "loss": base, "words": int(lanes * ((len(ids) - 1) // lanes))}
    for i, name in enumerate(paths(everything)):
        if name not in _matrices(scene.dense, scene.rules):
            continue
        spread = observations.densities(leaves[i], density)
        groups = min(probe.groups, leaves[i].shape[0])

        def measure(w: Any, i: int = i, groups: int = groups) -> Any:
            at = lambda w: loss([*leaves[:i], w, *leaves[i + 1 :]])
            return row_sensitivity(at, w, density, groups)

        shares, losses = jax.device_get(jax.jit(measure)(leaves[i]))
        kept = observations.retained(leaves[i], probe.size)
        out[name] = {
            "rows": {"low": spread.low, "median": spread.middle, "high": spread.high, "dispersion": spread.dispersion},
            "sensitivity": {
                "density": [float(x) for x in shares],
                "loss": [float(x) - base for x in losses],
                "spearman": observations.spearman(shares, losses),
            },
            "retained": {k: v._asdict() for k, v in kept.items()},
        }
    return out


def _sizes(scene: Scene) -> dict[str, np.ndarray]:
    """Block size of every row of the leaves that a DARB or block-max rule holds."""
    assert scene.rules is not None
    leaves, out = jax.tree.leaves(scene.result.params), {}
    for b in resolve(scene.rules, scene.result.params):
        spec = b.constraint.spec
        if b.constraint.joint or spec["kind"] not in ("darb", "block_max"):
            continue
        w, structure = np.asarray(b.take(leaves)), scene.result.structure[b.name][0]
        rows = w.shape[0] if spec["axis"] == "outputs" else w.shape[1]
        allowed = np.asarray(spec.get("allowed", [0]))
        out[b.paths[0]] = (
            np.full(rows, spec["size"]) if spec["kind"] == "block_max" else allowed[np.asarray(structure)]
        )
    return out


def _blocks(scene: Scene) -> dict[str, Any]:
    """Of DARB: how often each block size is used, its rank correlation with 1 / row density, kept against asked."""
    assert scene.rules is not None
    weights, dense, out = _matrices(scene.result.params, scene.rules), _matrices(scene.dense, scene.rules), {}
    specs = {p: b.constraint.spec for b in resolve(scene.rules, scene.result.params) for p in b.paths}
    for path, sizes in _sizes(scene).items():
        spec, w = specs[path], weights[path]
        length = w.size // len(sizes)
        density = spec.get("density", 1.0 / spec.get("size", 1))
        rows = observations.densities(dense[path], density, spec["axis"]).rows
        places = int((-(-length // sizes)).sum())
        used, number = np.unique(sizes, return_counts=True)
        out[path] = {
            "sizes": {str(s): int(n) for s, n in zip(used, number, strict=True)},
            "spearman": observations.spearman(sizes, 1.0 / np.maximum(rows, 0.5 / length)),
            "places": places,
            "off_target": places / (density * w.size) - 1.0,
            "nonzeros": int(np.count_nonzero(w)),
        }
    return out


def _cut(spec: Mapping[str, Any]) -> tuple[int, str]:
    """Length of a bank, and the axis along which banks and blocks run, of a rule or where it says nothing of them."""
    known = spec["kind"] in ("darb", "block_max", "bank_balanced")
    return spec.get("bank", BANK), spec["axis"] if known else "outputs"


def _storage(scene: Scene) -> dict[str, Any]:
    """Bytes of all constrained leaves in every format that holds them, and index bits a non-zero.

    "bank-balanced" stores whatever is there by banks as long as the fullest; the rule need not have cut any.
    """
    assert scene.rules is not None
    leaves = jax.tree.leaves(scene.result.params)
    held = [b for b in resolve(scene.rules, scene.result.params) if not b.constraint.joint]
    nonzeros = sum(int(np.count_nonzero(np.asarray(b.take(leaves)))) for b in held)
    sizes = {}
    for name in FORMATS:
        total = 0
        try:
            for b in held:
                packed = formats.pack(b.take(leaves), b.constraint, scene.result.structure[b.name], format=name)
                total += formats.nbytes(packed)
        except ValueError:
            continue  # the format does not hold such a structure
        sizes[name] = total
    sizes["bank-balanced"] = 0
    for b in held:
        bank, axis = _cut(b.constraint.spec)
        packed = formats.pack(b.take(leaves), bank_balanced(1.0, bank, axis=axis), (), "bank-balanced")
        sizes["bank-balanced"] += formats.nbytes(packed)
    return {
        name: {"bytes": total, "index_bits": (total - 4 * nonzeros) * 8 / max(nonzeros, 1)}
        for name, total in sizes.items()
    }


def _decoding(scene: Scene) -> dict[str, Any]:
    """Decoder work a non-zero, over all constrained leaves; block-max where the rules cut rows into blocks."""
    assert scene.rules is not None
    sizes = _sizes(scene)
    specs = {p: b.constraint.spec for b in resolve(scene.rules, scene.result.params) for p in b.paths}
    total: dict[str, list[Any]] = {}
    for path, w in _matrices(scene.result.params, scene.rules).items():
        bank, axis = _cut(specs[path])
        for name, done in decoding.work(w, sizes.get(path), bank=bank, axis=axis).items():
            total.setdefault(name, []).append(done)
    whole = len(_matrices(scene.result.params, scene.rules))
    out = {}
    for name, each in total.items():
        if len(each) == whole:
            n, *work = (sum(v) for v in zip(*each, strict=True))
            out[name] = dict(zip(("reads", "additions", "products"), (v / max(n, 1) for v in work), strict=True))
    return out


# -- the page ----------------------------------------------------------------------------------------------------------


def pictures(scene: Scene) -> list[html.Picture]:
    """The standard plots with perplexity for accuracy, and the kept blocks."""
    records = metrics.read_metrics(scene.workdir / "metrics.jsonl")
    for r in records:
        for name in ("test", "validation", "train"):
            loss = r.get("loss" if name == "train" else f"{name}_loss")
            if loss is not None:
                r[f"{name}_perplexity"] = math.exp(min(loss, 50.0))
    rules = scene.rules
    before, after = (artifacts.constrained(p, rules) if rules else None for p in (scene.dense, scene.result.params))
    out = run.standard_pictures(
        scene.workdir,
        records,
        before,
        after,
        metric="perplexity",
        metric_curves={name: f"{name}_perplexity" for name in ("test", "validation", "train")},
        loss_curves={"test": "test_loss", "validation": "validation_loss", "train": "loss"},
    )
    if rules:
        shown = _matrices(scene.result.params, rules)
        sizes = _sizes(scene) or {p: row_sizes(w != 0) for p, w in shown.items()}
        path = row_plots.kept_blocks(scene.workdir / "blocks.png", shown, sizes)
        note = "Rows are what one input sends out, those of one block size together; colour is the row's block size."
        out.append(html.Picture(path, "Kept weights of rows", f"{note} The first 128 columns of up to 32 rows."))
    return out


def sections(scene: Scene, found: Mapping[str, Any]) -> list[tuple[str, html.Content]]:
    """Observations, block sizes, storage and decoding as tables and plots."""
    out: list[tuple[str, html.Content]] = []
    if found.get("observations"):
        out.append(("Three observations on the dense network", _observed(scene, found["observations"])))
    if found.get("blocks"):
        rows = [
            (p, ", ".join(f"{n} of {s}" for s, n in b["sizes"].items()), f"{b['spearman']:.3f}",
             fmt.count(b["places"]), f"{100 * b['off_target']:+.2f} %", fmt.count(b["nonzeros"]))
            for p, b in found["blocks"].items()
        ]  # fmt: skip
        header = ("leaf", "rows of each block size", "rank correlation with 1 / density", "blocks", "off target",
                  "non-zeros")  # fmt: skip
        out.append(("Block sizes", html.Table(header, rows, (False, False, True, True, True, True))))
    if found.get("storage"):
        stored = [(n, fmt.size(s["bytes"]), f"{s['index_bits']:.2f}") for n, s in found["storage"].items()]
        table = html.Table(("format", "constrained weights", "bits beside each value"), stored, (False, True, True))
        note = (
            "From the arrays themselves, block-size codes, padding and stored zeros included. Bank-balanced: counted, "
            f"every bank (of {BANK} weights where the rules name no other) has the entries of the fullest. "
            "Values are float32."
        )
        out.append(("Storage", [note, table]))
    if found.get("decoding"):
        decoded = [
            (n, *(f"{d[k]:.3f}" for k in ("reads", "additions", "products"))) for n, d in found["decoding"].items()
        ]
        heads = ("format", "indices read", "dependent additions", "products")
        note = "A decoder's work per non-zero weight, as compressx.formats.decoding counts it."
        out.append(("Decoding", [note, html.Table(heads, decoded, (False, True, True, True))]))
    out.append(("A word's time", word_times(found["latency"])))
    return out


def word_times(facts: Mapping[str, Any]) -> html.Content:
    """What `latency.of_words` has measured, or the reason why not."""
    if "reason" in facts:
        return f"Not measured: {facts['reason']}."
    names = {"dense_xla": "dense, on XLA", "dense_kernels": "dense, by the kernels"}
    rows = []
    for key, q in facts.items():
        if isinstance(q, Mapping):
            low, median, high = (f"{1e3 * q[k]:.1f}" for k in ("low", "median", "high"))
            rows.append((names.get(key.removesuffix("_ms"), key.removesuffix("_ms")), median, low, high))
    note = (
        f"Batch 1, one word after the other, {facts['words']} in a call: vector, LSTM layers and logits, from the "
        f"stored matrices by {facts['path']}; {facts['rounds']} rounds, each network once in a round."
    )
    return [note, html.Table(("network", "µs a word", "first quartile", "third"), rows, (False, True, True, True))]


def _observed(scene: Scene, found: Mapping[str, Any]) -> html.Content:
    assert scene.rules is not None
    leaves = {p: f for p, f in found.items() if isinstance(f, dict)}
    dense = _matrices(scene.dense, scene.rules)
    density = found["density"]
    rows = {p: observations.densities(dense[p], density).rows for p in leaves}
    one = row_plots.row_densities(scene.workdir / "row_density.png", rows, density)
    curves = {p: (f["sensitivity"]["density"], f["sensitivity"]["loss"]) for p, f in leaves.items()}
    two = plots.lines(
        scene.workdir / "row_sensitivity.png",
        {p: (np.asarray(x), np.asarray(y)) for p, (x, y) in curves.items()},
        title="What pruning one group of rows costs",
        ylabel="rise of the loss",
        xlabel=f"mean density of the group's rows after magnitude pruning to {density:g}",
    )
    table = html.Table(
        ("leaf", "row density, deciles 1 / 5 / 9", "dispersion", "density and cost, rank correlation",
         *(f"{n}: energy, overlap" for n in STRUCTURES.values())),
        [
            (p, " / ".join(f"{f['rows'][k]:.3f}" for k in ("low", "median", "high")), f"{f['rows']['dispersion']:.1f}",
             f"{f['sensitivity']['spearman']:.2f}",
             *(f"{f['retained'][s]['energy']:.3f}, {f['retained'][s]['overlap']:.3f}" for s in STRUCTURES))
            for p, f in leaves.items()
        ],
        (False, *[True] * (3 + len(STRUCTURES))),
    )  # fmt: skip
    note = (
        f"At a density of {density:g}, before anything is compressed. Dispersion: variance of the rows' counts over "
        f"that of chance. Cost: the loss on {found['words']} validation words above {found['loss']:.4f}. Energy and "
        "overlap: against the same number of largest weights."
    )
    return [
        note,
        html.Picture(one, "Row densities", "Rows in the order of their density; the dashed line is the mean."),
        html.Picture(two, "Row sensitivity", "Each group in turn is pruned to that density, all other rows are dense."),
        table,
    ]


def phase_table(
    todo: Sequence[Phase], results: Mapping[str, Any], exact: Mapping[str, Mapping[str, Any]]
) -> html.Table:
    """A row a phase; perplexities at its start and end in lanes, at its end also exact."""
    rows = []
    for p in todo:
        start, end = (f"{math.exp(min(results[p.name][k]['test_loss'], 700.0)):.2f}" for k in ("start", "end"))
        last = f"{exact[p.name]['value']:.2f}" if p.name in exact else fmt.ABSENT
        rows.append((p.name, p.start or "-", str(p.fit.epochs), f"{p.fit.lr:g}", start, end, last))
    header = ("phase", "starts from", "epochs", "learning rate", "at its start, lanes", "at its end, lanes", "exact")
    return html.Table(header, rows, (False, False, True, True, True, True, True))
