"""Perplexity against compression for several structures, at equal measured rates and equal budgets.

    python -m experiments.language_model --config=configs/language_model.py:curves_generated --workdir=runs/curves

Every point is a run of `experiments.language_model` in a folder of its own below `runs/`, resumable like any other. All
points of a seed start from one dense network, trained first, and get the same number of epochs after it. A folder may
be extended with other points or seeds of the same experiment: runs that it holds are reused, the rest is made anew.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.common import artifacts, driver, latency, runner, training
from experiments.common.driver import Options
from experiments.common.report import format as fmt
from experiments.common.report import html, plots
from experiments.common.report.metrics import MetricsWriter
from experiments.common.training import ConfigError
from experiments.common.training.config import METHODS, Rule
from experiments.language_model import config as language_config
from experiments.language_model import page as language_page
from experiments.language_model import task as language_model

DENSE = "dense, same budget"


@dataclass(frozen=True)
class Point:
    """One structure at one rate.

    Attributes:
      curve: the structure; points of one name are one curve.
      name: of the rate, part of a folder's name.
      rules: the constraints.
      method: "admm", "one_shot", "gradual", or "dense" (the same epochs without constraints).
      seeds: () is the sweep's.
    """

    curve: str
    name: str
    rules: tuple[Rule, ...]
    method: str = "admm"
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config:
    """One comparison.

    Attributes:
      base: the experiment; its plan has one stage, whose rules the points replace.
      points: what is compared.
      seeds: every point is run with each, unless it has its own.
      main: the curve that the summary reports and the others are compared with.
      at: the name of the rate at which they are.
      variant: its name.
    """

    base: language_config.Config
    points: tuple[Point, ...]
    seeds: tuple[int, ...] = (0,)
    main: str = "darb"
    at: str = ""
    variant: str = ""

    @property
    def seed(self) -> int:
        """The first seed of the headline's point, under which a summary of all stands."""
        (head,) = [p for p in self.points if (p.curve, p.name) == (self.main, self.at)]
        return (head.seeds or self.seeds)[0]

    def __post_init__(self) -> None:
        names = [(p.curve, p.name) for p in self.points]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"points need names of their own within a curve, at least one; got {names}")
        for p in self.points:
            if p.method not in METHODS:
                raise ConfigError(f"method={p.method!r} is impossible; it must be one of {', '.join(METHODS)}")
        for seeds in (self.seeds, *(p.seeds for p in self.points if p.seeds)):
            if not seeds or len(set(seeds)) != len(seeds):
                raise ConfigError(f"seeds={seeds} is impossible; give different ones, at least one")
        if (self.main, self.at) not in names:
            raise ConfigError(f"main={self.main!r} at={self.at!r} is no point; there are {names}")
        if self.base.rules:
            raise ConfigError(f"base.rules={self.base.rules!r}: the points give the rules; leave it empty")
        if len(self.base.plan.stages) != 1 or self.base.plan.baselines or self.base.init_from:
            raise ConfigError("base needs one stage, no baselines and no init_from: the points are compared instead")


class Run(NamedTuple):
    """One run: its folder's name, what it is, and the point (None: the dense network of a seed)."""

    name: str
    config: language_config.Config
    point: Point | None
    seed: int


def read(config: Any) -> Config | language_config.Config:
    """The frozen config of a comparison, which has points, or of a single experiment."""
    return training.parse(Config, config) if "points" in config else language_config.read(config)


def runs(config: Config, workdir: Any) -> list[Run]:
    """All runs, those of a seed together, its dense network first."""
    seeds = list(dict.fromkeys(s for p in config.points for s in p.seeds or config.seeds))
    first = config.base.plan.stages[0]
    todo = []
    for seed in seeds:
        dense = dataclasses.replace(
            config.base,
            seed=seed,
            plan=dataclasses.replace(
                config.base.plan,
                method="one_shot",
                stages=(dataclasses.replace(first, admm=_none(first.admm), retrain=_none(first.retrain)),),
            ),
        )
        todo.append(Run(f"dense-s{seed}", dense, None, seed))
        for p in config.points:
            if seed in (p.seeds or config.seeds):
                stage = dataclasses.replace(first, rules=p.rules)
                plan = dataclasses.replace(config.base.plan, method=p.method, stages=(stage,))
                probe = dataclasses.replace(config.base.probe, run=False)  # once a seed is enough
                source = str(workdir / "runs" / f"dense-s{seed}")
                one = dataclasses.replace(config.base, plan=plan, seed=seed, init_from=source, probe=probe)
                todo.append(Run(f"{_plain(p.curve)}-{p.name}-s{seed}", language_config.with_own_seed(one), p, seed))
    return todo


def _none(fit: Any) -> Any:
    return dataclasses.replace(fit, epochs=0)


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def run(config: Config | language_config.Config, options: Options) -> dict[str, Any]:
    """Runs what is left of a comparison and draws it, or runs a single experiment.

    Raises:
      One of `driver.USER_ERRORS`; the runs done so far stay done.
    """
    if isinstance(config, language_config.Config):
        return language_model.train_and_evaluate(config, options)
    workdir, written = options.workdir, dataclasses.asdict(config)
    other = _holds_other_points(workdir, written)
    if not other and (summary := driver.finished(workdir, written)) is not None:
        return summary
    todo = runs(config, workdir)
    job, _ = language_model.make_job(todo[0].config, options)
    for r in todo:  # every point's rules and folder, before anything is trained
        training.check_phases(job, language_model.plan_phases(r.config))
        driver.check_claim(workdir / "runs" / r.name, dataclasses.asdict(r.config))
    if other:  # the summary first: without it the folder is unfinished under either config
        (workdir / "summary.json").unlink(missing_ok=True)
        (workdir / "config.json").unlink()
    driver.claim(workdir, written)
    done = []
    for number, r in enumerate(todo):
        print(f"[{number + 1}/{len(todo)}] {r.name}", flush=True)
        there = dataclasses.replace(options, workdir=workdir / "runs" / r.name)
        done.append((r, language_model.train_and_evaluate(r.config, there)))
    return conclude(config, options, done)


def _holds_other_points(workdir: Path, written: dict[str, Any]) -> bool:
    """Whether the folder compares the same experiment at other points: its runs serve here, each checked by itself."""
    try:
        there = json.loads((workdir / "config.json").read_text())
    except (OSError, ValueError):  # none yet, or damaged, which `driver.claim` says
        return False
    now = json.loads(json.dumps(written))
    same = isinstance(there, dict) and all(there.get(k) == now[k] for k in ("base", "variant"))
    return same and there != now


def evaluate(config: Config | language_config.Config, options: Options) -> dict[str, Any]:
    """Evaluates a finished experiment; a comparison has no model of its own."""
    if isinstance(config, language_config.Config):
        return language_model.evaluate(config, options)
    raise ConfigError("a comparison has no model; evaluate a run below runs/: experiments.language_model --mode=eval")


def table(config: Config, done: list[tuple[Run, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a point: measured rates, and perplexities in the order of the seeds with mean and spread.

    `spread` is the sample standard deviation, null for a single seed.
    """
    rows = []
    for p in config.points:
        mine = [s for r, s in done if r.point is p]
        key = "dense_same_budget" if p.method == "dense" else "compressed"
        values = [s["metric"][key] for s in mine]
        rates = {k: [s["rate"][k] for s in mine] for k in ("constrained_weights", "all_weights", "bytes")}
        dense = p.method == "dense"
        rows.append(
            {
                "curve": p.curve,
                "point": p.name,
                "method": p.method,
                "rate": None if dense else float(np.mean(rates["constrained_weights"])),
                "all_rate": None if dense else float(np.mean(rates["all_weights"])),
                "bytes_rate": None if dense else float(np.mean(rates["bytes"])),
                "seeds": list(p.seeds or config.seeds),
                "perplexity": values,
                "mean": float(np.mean(values)),
                "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "hardened": None if dense else [s["metric"]["hardened"] for s in mine],
            }
        )
    return rows


def rate_at(rows: list[dict[str, Any]], perplexity: float) -> tuple[str, float]:
    """The rate at which a curve reaches a perplexity: between two points, log rate linear in log perplexity.

    Returns:
      "at" and the rate; or "above" and the curve's highest rate where all its points are better than that, "below" and
      its lowest where all are worse.
    """
    at = sorted((row["rate"], row["mean"]) for row in rows if row["rate"] is not None)
    for (r0, p0), (r1, p1) in zip(at, at[1:], strict=False):
        if min(p0, p1) <= perplexity <= max(p0, p1) and p0 != p1:
            part = (math.log(perplexity) - math.log(p0)) / (math.log(p1) - math.log(p0))
            return "at", math.exp(math.log(r0) + part * (math.log(r1) - math.log(r0)))
    best = min(p for _, p in at)
    return ("below", at[0][0]) if perplexity < best else ("above", at[-1][0])


def word_times(config: Config, options: Options, done: list[tuple[Run, Any]]) -> tuple[Any, dict[str, Any]]:
    """`latency.of_words` of all networks at the headline rate, with the headline's first seed, measured in turn."""
    (head,) = [p for p in config.points if (p.curve, p.name) == (config.main, config.at)]
    seed, folder = (head.seeds or config.seeds)[0], options.workdir / "runs"
    at = [r for r, _ in done if r.point and r.seed == seed and r.point.name == config.at]
    mine = {r.point.curve: r for r in at if r.point and r.point.method != "dense"}
    one = mine[config.main]
    job, corpus = language_model.make_job(one.config, dataclasses.replace(options, workdir=folder / one.name))
    model = language_model.build_model(one.config.model, len(corpus.words))
    stored = {curve: artifacts.read(folder / r.name / artifacts.MODEL).saved.packed for curve, r in mine.items()}
    return latency.of_words(model, job.first.params, stored)


def conclude(config: Config, options: Options, done: list[tuple[Run, dict[str, Any]]]) -> dict[str, Any]:
    """Writes the table, the plot, the page and the summary."""
    workdir, rows = options.workdir, table(config, done)
    times, facts = word_times(config, options, done)
    for row in rows:
        row["word_ms"] = times.get(row["curve"]) if times and row["point"] == config.at else None
    with MetricsWriter(workdir / "metrics.jsonl") as writer:
        for number, (r, s) in enumerate(done):
            writer.write(number, r.point.curve if r.point else "dense", run=r.name, rate=s["rate"], metric=s["metric"])
    dense = [s["metric"]["dense"] for r, s in done if r.point is None]
    drawn, controls = _curves(rows), {"dense": dense}
    for row in rows:
        if row["method"] == "dense":
            controls[DENSE] = row["perplexity"]
    path = plots.metric_against_rate(
        workdir / "curves.png", drawn, controls=controls, name="perplexity", percent=False
    )
    text = "Mean over seeds with the sample standard deviation; every dot is a run. Same dense network, same epochs."
    (headline,) = [row for row in rows if (row["curve"], row["point"]) == (config.main, config.at)]
    equal = {c: rate_at([r for r in rows if r["curve"] == c], headline["mean"]) for c in drawn}
    sign = {"at": "", "above": "> ", "below": "< "}
    words = {c: sign[how] + fmt.rate(rate) for c, (how, rate) in equal.items()}
    first, same = done[0][1], [row for row in rows if row["method"] == "dense"]
    one = [r for r in rows if r["method"] == "one_shot" and r["point"] == config.at and config.main in r["curve"]]
    told = runner.summary(
        "language_curves",
        config,
        options,
        dataset=first["dataset"],
        metric=runner.metric(
            "perplexity",
            headline["mean"],
            higher_is_better=False,
            dense=float(np.mean(dense)),
            dense_same_budget=same[0]["mean"] if same else None,
            one_shot=one[0]["mean"] if one else None,
            hardened=float(np.mean(headline["hardened"])),
        ),
        latency_ms=times and {"dense": times["dense"], "compressed": times[config.main]},
        seconds=sum(s["seconds"] for _, s in done),
        block={
            "rows": rows,
            "at": {_plain(r["curve"]): r["mean"] for r in rows if r["point"] == config.at},
            "equal_perplexity": {
                _plain(c): {"how": how, "rate": rate, "text": words[c]} for c, (how, rate) in equal.items()
            },
            "spread": headline["spread"],
            "latency": facts,
            "references": first["language_model"]["references"],
            "observations": first["language_model"].get("observations"),
        },
    )
    told["rate"] = {
        "constrained_weights": headline["rate"],
        "all_weights": headline["all_rate"],
        "bytes": headline["bytes_rate"],
    }
    told["violations"] = sum(s["violations"] or 0 for _, s in done)
    equals = html.Table(("structure", "rate"), list(words.items()), (False, True))
    level = f"{config.main} at {fmt.rate(headline['rate'])} reaches a perplexity of {headline['mean']:.2f}."
    summary = runner.conclude(
        told,
        options,
        pictures=[html.Picture(path, "Perplexity against compression", text)],
        sections=[
            ("Runs", _html_table(rows)),
            ("Rate at equal perplexity", [level, equals]),
            (f"A word's time at {config.at}", language_page.word_times(facts)),
        ],
        links=[(r.name, f"runs/{r.name}/report.html") for r, _ in done],
    )
    print("\n".join(f"{r['curve']:<24}{fmt.rate(r['rate']):>8}  {_mean(r)}" for r in rows))
    print(f"Report: {workdir / 'report.html'}")
    return summary


def _curves(rows: list[dict[str, Any]]) -> dict[str, tuple[list[float], list[list[float]]]]:
    """Curve -> rates and perplexities, padded with NaN where a point has fewer seeds."""
    most = max(len(row["perplexity"]) for row in rows)
    out: dict[str, tuple[list[float], list[list[float]]]] = {}
    for row in rows:
        if row["method"] != "dense":
            rates, values = out.setdefault(row["curve"], ([], []))
            rates.append(row["rate"])
            values.append(row["perplexity"] + [math.nan] * (most - len(row["perplexity"])))
    return out


def _mean(row: dict[str, Any]) -> str:
    return f"{row['mean']:.2f}" if row["spread"] is None else f"{row['mean']:.2f} ± {row['spread']:.2f}"


def _html_table(rows: list[dict[str, Any]]) -> html.Table:
    header = ("structure", "method", "rate", "bytes", "perplexity", "by seed")
    body = [
        (
            row["curve"],
            row["method"],
            fmt.rate(row["rate"]),
            fmt.rate(row["bytes_rate"]),
            _mean(row),
            ", ".join(f"{v:.2f} ({s})" for s, v in zip(row["seeds"], row["perplexity"], strict=True)),
        )
        for row in rows
    ]
    return html.Table(header, body, (False, False, True, True, True, False))
