"""What the speech driver says about a trained network: error rates, stored bytes, times, pictures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compressx import constraints, formats
from compressx.rules import Rules, resolve
from compressx.timing import interleaved
from compressx.tree import paths
from experiments.common.data.batches import cover
from experiments.common.report import format as fmt
from experiments.common.report import html, plots
from experiments.common.report.summary import SummaryError, lookup, read_summary
from experiments.common.training import ConfigError, Weights
from experiments.gru_speech import plots as speech_plots
from experiments.gru_speech import speech
from experiments.gru_speech.speech import decode, errors, rates, streaming
from experiments.gru_speech.speech.features import Moments

DENSE_PER = 0.188  # of the paper's dense network, to which the released rates are compared


class Heard(NamedTuple):
    """A split, ready: utterances by rising length, their normalised features, and the arrays of training."""

    corpus: speech.Corpus
    features: list[np.ndarray]
    moments: Mapping[str, Moments]
    arrays: dict[str, np.ndarray]


class Language(NamedTuple):
    """What decoding knows from the training utterances."""

    lm: decode.Bigram
    frames: decode.Frames


def hear(corpus: speech.Corpus, front: speech.FrontEnd) -> Heard:
    """Features of a split, normalised per speaker."""
    ordered = sorted(corpus.utterances, key=lambda u: (len(u.samples), u.name))
    raw = [speech.features.features(u.samples, corpus.rate, front) for u in ordered]
    found, moments = speech.features.per_speaker(raw, [u.speaker for u in ordered])
    sorted_corpus = speech.Corpus(tuple(ordered), corpus.rate, corpus.inventory, corpus.unit, corpus.info)
    return Heard(sorted_corpus, found, moments, speech.batches.arrays(sorted_corpus, found, front))


def language(heard: Heard, ctc: bool) -> Language:
    """Bigram and frame statistics of the training utterances."""
    inventory = heard.corpus.inventory
    spoken = [inventory.trained(u.labels) for u in heard.corpus.utterances]
    if not ctc:  # a unit that follows itself is one longer unit for a decoder of frames
        spoken = [decode.units_of(np.asarray(s, np.int64)) for s in spoken]
    n = len(inventory.names)
    return Language(decode.bigram(spoken, n), decode.frame_statistics(list(heard.arrays["labels"]), n))


def references(heard: Heard) -> list[list[int]]:
    """The scored units of every utterance."""
    inventory = heard.corpus.inventory
    return [inventory.folded(inventory.trained(u.labels)) for u in heard.corpus.utterances]


class Scorer:
    """Error rates of weights on splits; the weight of the language model and the reward are chosen on `dev`."""

    def __init__(self, model: Any, loss: str, settings: Any, known: Language, batch: int) -> None:
        self.loss, self.settings, self.known, self.batch = loss, settings, known, batch
        self._apply = jax.jit(lambda params, x: jax.nn.log_softmax(model.apply(params, x, train=False)))

    def log_p(self, params: Any, heard: Heard) -> list[np.ndarray]:
        """Log-probabilities of every utterance's frames."""
        inputs, out = heard.arrays["inputs"], []
        n = len(inputs)
        for rows, valid in zip(*cover(n, min(self.batch, n)), strict=True):
            logs = np.asarray(self._apply(params, jnp.asarray(inputs[rows])))
            out += [logs[i, : heard.arrays["frames"][r]] for i, r in enumerate(rows) if valid[i]]
        return out

    def decode(self, log_p: Sequence[np.ndarray], lm_weight: float, reward: float) -> list[list[int]]:
        """Trained units of every utterance."""
        known = self.known
        if self.loss == "ctc":
            lm = known.lm if lm_weight else None
            return [decode.prefix_beam(x, lm, lm_weight, reward, self.settings.ctc_beam)[0] for x in log_p]
        longest = max(len(x) for x in log_p)
        scores = np.zeros((len(log_p), longest, log_p[0].shape[1]), np.float32)
        for i, x in enumerate(log_p):
            scores[i, : len(x)] = x - self.settings.prior * known.frames.prior[None]
        frames = np.array([len(x) for x in log_p], np.int32)
        beam = self.settings.beam or np.inf
        weights = (jnp.float32(w) for w in (lm_weight, reward, beam))
        found, _ = decode.viterbi(scores, frames, known.lm, known.frames.stay, *weights)
        return [decode.units_of(p) for p in np.asarray(found)]

    def tune(self, params: Any, dev: Heard) -> tuple[float, float]:
        """The weight and the reward of fewest errors on a split, the earliest of equals."""
        log_p, wanted, fold = self.log_p(params, dev), references(dev), dev.corpus.inventory.folded
        grid = [(w, v) for w in self.settings.lm_weights for v in self.settings.rewards]
        if len(grid) == 1:
            return grid[0]
        found = [errors.count(wanted, [fold(h) for h in self.decode(log_p, w, v)]).rate for w, v in grid]
        return grid[int(np.argmin(found))]

    def score(
        self, params: Any, heard: Heard, lm_weight: float, reward: float
    ) -> tuple[errors.Errors, list[list[int]]]:
        """Errors of a split and what was recognised, in scored units."""
        fold = heard.corpus.inventory.folded
        found = [fold(h) for h in self.decode(self.log_p(params, heard), lm_weight, reward)]
        return errors.count(references(heard), found), found

    def figures(self, params: Any, dev: Heard, test: Heard) -> dict[str, Any]:
        """Error rates on test with their kinds, the rate on dev, and the weights chosen there."""
        lm_weight, reward = self.tune(params, dev)
        counted = self.score(params, test, lm_weight, reward)[0]
        return {
            "error_rate": counted.rate,
            **counted.parts(),
            "tokens": counted.tokens,
            "dev_error_rate": self.score(params, dev, lm_weight, reward)[0].rate,
            "lm_weight": lm_weight,
            "reward": reward,
        }


def plain(train: Heard, dev: Heard, test: Heard) -> dict[str, Any]:
    """What Gaussian hidden Markov models make of the same features: error rates, as of a network.

    Three states a phone, eight a word; the bigram's weight and the reward are chosen on dev.
    """
    inventory = train.corpus.inventory
    spoken = [inventory.trained(u.labels) for u in train.corpus.utterances]
    states = 3 if train.corpus.unit == "phone" else 8
    made = speech.reference.train(train.features, spoken, len(inventory.names), states)
    lm = decode.bigram(spoken, len(inventory.names))

    def errors_on(heard: Heard, lm_weight: float, reward: float) -> errors.Errors:
        found = [speech.reference.recognise(made, x, lm, lm_weight, reward) for x in heard.features]
        return errors.count(references(heard), [inventory.folded(f) for f in found])

    grid = [(w, v) for w in (1.0, 4.0, 10.0) for v in (-20.0, -10.0, 0.0, 10.0)]
    best = min(grid, key=lambda g: errors_on(dev, *g).rate)
    counted = errors_on(test, *best)
    return {
        "states": states,
        "error_rate": counted.rate,
        **counted.parts(),
        "dev_error_rate": errors_on(dev, *best).rate,
        "lm_weight": best[0],
        "reward": best[1],
    }


# -- what is stored, and what it costs ---------------------------------------------------------------------------------


def matrices(params: Any, rules: Rules | None) -> dict[str, dict[str, Any]]:
    """Weights, kept weights and rate of every constrained matrix."""
    if rules is None:
        return {}
    names, leaves = paths(params), jax.tree.leaves(params)
    out = {}
    for bound in resolve(rules, params):
        for i in bound.indices:
            kept = int(np.count_nonzero(leaves[i]))
            out[names[i]] = {"weights": leaves[i].size, "kept": kept, "rate": leaves[i].size / kept if kept else None}
    return out


def stored_as(weights: Weights, rules: Rules, name: str) -> dict[str, formats.Packed]:
    """Every leaf packed, the constrained ones in the format of that name, the others dense."""
    names, leaves = paths(weights.params), jax.tree.leaves(weights.params)
    bound = {
        p: constraints.on_leaf(b.constraint, weights.structure[b.name], i)
        for b in resolve(rules, weights.params)
        for i, p in enumerate(b.paths)
    }
    return {
        path: formats.pack(leaf, *bound[path], name) if path in bound else formats.pack(leaf, format="dense")
        for path, leaf in zip(names, leaves, strict=True)
    }


def dense_leaves(params: Any) -> dict[str, formats.Packed]:
    """Every leaf stored dense."""
    return {n: formats.pack(x, format="dense") for n, x in zip(paths(params), jax.tree.leaves(params), strict=True)}


def matrix_bytes(packed: Mapping[str, formats.Packed], names: Sequence[str]) -> int:
    """Bytes of the matrices alone, as the paper counts."""
    return sum(formats.nbytes(packed[n]) for n in names)


def times(config: Any, nets: Mapping[str, tuple[Mapping[str, formats.Packed], str]], features: int) -> dict[str, Any]:
    """Milliseconds of one time step of each network (packed leaves, way), measured in turn."""
    x, state = jnp.zeros((1, features)), jnp.zeros((config.model.layers, 1, config.model.hidden))
    runs = {}
    for name, (packed, way) in nets.items():
        network = streaming.prepare(packed, way, config.model.layers)
        step = jax.jit(streaming.make_step(way, config.model.reset))
        runs[name] = lambda step=step, network=network: step(network, state, x)
    return {name: streaming.quartiles(t)._asdict() for name, t in interleaved(runs, config.timing_rounds).items()}


# -- pictures ----------------------------------------------------------------------------------------------------------


def curves(arms: Mapping[str, Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By structure and method: rates, rising, and error rates `[rates, seeds]`, NaN where a seed has no such arm."""
    out: dict[str, Any] = {}
    for name, arm in arms.items():
        if arm["method"] == "dense":
            continue
        label = arm["structure"].replace("_", " ") + {"admm": "", "one_shot": ", one-shot"}[arm["method"]]
        values = [arm["error_rate"]] + [o[name]["error_rate"] if name in o else math.nan for o in others]
        out.setdefault(label, []).append((arm["rate"], values))
    ordered = {label: sorted(points) for label, points in out.items()}
    return {label: ([r for r, _ in points], [v for _, v in points]) for label, points in ordered.items()}


def read_others(folders: Sequence[str], variant: str, dataset: str) -> list[dict[str, Any]]:
    """The own blocks of finished runs with other seeds.

    Raises:
      ConfigError: a folder holds no finished run of this driver on the same data.
    """
    out = []
    for folder in folders:
        try:
            summary = read_summary(Path(folder) / "summary.json")
        except SummaryError as error:
            raise ConfigError(f"with_runs: {error}") from None
        if summary["driver"] != "gru_speech" or summary["dataset"]["name"] != dataset:
            raise ConfigError(
                f"with_runs={folder!r} is a run of {summary['driver']} on {summary['dataset']['name']}, not of "
                f"gru_speech on {dataset}"
            )
        block = lookup(summary, "gru_speech.arms")
        if not isinstance(block, dict) or not all(isinstance(a, dict) and "error_rate" in a for a in block.values()):
            raise ConfigError(f"with_runs={folder!r} has no arms in its summary")
        out.append({"dense": {"error_rate": summary["metric"]["dense"]}, **block})
    return out


def rate_pictures(
    workdir: Path, name: str, dense: float, arms: Mapping[str, Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> list[html.Picture]:
    """Error against rate, and how much worse than dense each rate is beside the paper's released networks."""
    methods = curves(arms, others)
    if not methods:
        return []
    level = [dense, *(o["dense"]["error_rate"] for o in others)]
    text = "Every dot is a run; rates count the gate matrices, as the paper does."
    path = plots.metric_against_rate(workdir / "rates.png", methods, controls={"dense": level}, name=name)
    out = [html.Picture(path, f"{name.capitalize()} against compression", text)]
    worse = {
        label: (at, [[v - d for v, d in zip(row, level, strict=True)] for row in values])
        for label, (at, values) in methods.items()
        if label == "bsp"
    }
    if worse:
        released = sorted(rates.RELEASED.values())
        theirs = ([r for r, _ in released], [[per - DENSE_PER] for _, per in released])
        path = plots.metric_against_rate(
            workdir / "degradation.png",
            {"here": next(iter(worse.values())), "RTMobile's released networks, TIMIT": theirs},
            name="error rate above dense",
            title="Degradation against compression",
        )
        text = "Other data and another size of network: the shapes can be compared, the levels cannot."
        out.append(html.Picture(path, "Degradation beside the paper's", f"{text} Dense there: 18.8 %, from memory."))
    return out


def sound_pictures(
    workdir: Path, scorer: Scorer, test: Heard, hop: float, nets: Mapping[str, Any], found: list[list[int]]
) -> list[html.Picture]:
    """Confusions of the compressed network, and one utterance with both networks' posteriors."""
    inventory = test.corpus.inventory
    table = errors.confusion(references(test), found, len(inventory.scored))
    title = f"{test.corpus.unit.capitalize()} confusions, compressed network"
    path = speech_plots.confusion(workdir / "confusion.png", table, inventory.scored, title)
    out = [html.Picture(path, "Confusions", "Rows are what was said; the diagonal is right.")]
    at = len(test.features) // 2  # the utterance of median length
    one = Heard(test.corpus, [test.features[at]], test.moments, {k: v[at : at + 1] for k, v in test.arrays.items()})
    names = ("-", *inventory.names) if scorer.loss == "ctc" else inventory.names
    shown = [(label, np.exp(scorer.log_p(params, one)[0])) for label, params in nets.items()]
    u = test.corpus.utterances[at]
    path = speech_plots.posterior(
        workdir / "posterior.png", u.samples, test.corpus.rate, shown, names, hop, u.segments, f"Utterance {u.name}"
    )
    text = "Sound with its labels, and the probability of each unit at every frame."
    return [*out, html.Picture(path, "Posterior over time", text)]


def arm_table(arms: Mapping[str, Mapping[str, Any]], dense: Mapping[str, Any]) -> html.Table:
    """All arms: rates, bytes, error rates and their kinds, the time of a step."""
    header = (
        *("arm", "structure", "method", "rate", "whole model", "bytes", "error rate"),
        *("sub", "del", "ins", "hardened only", "ms a step"),
    )
    rows = []
    for name, a in {"dense": {"structure": "-", "method": "-"} | dict(dense), **arms}.items():
        kinds = (fmt.percent(a[k], 1) for k in ("substitutions", "deletions", "insertions"))
        took = a.get("step_ms")
        rows.append(
            (
                name,
                a["structure"].replace("_", " "),
                a["method"].replace("_", " "),
                fmt.rate(a.get("rate")),
                fmt.rate(a.get("rate_all")),
                fmt.rate(a.get("rate_bytes")),
                fmt.percent(a["error_rate"]),
                *kinds,
                fmt.percent(a.get("hardened")),
                fmt.milliseconds(took["median"] if took else None),
            )
        )
    return html.Table(header, rows, (False, False, False, *[True] * 9))
