"""Accuracy against compression: one experiment over rates, methods and seeds, drawn with its spread.

    python -m experiments.sweep --config=configs/sweep.py:digits --workdir=runs/sweep

Every point is a run of `experiments.cnn` in a folder of its own below `runs/`, resumable like any other; all methods
and rates of a seed start from one dense network, which the first run of that seed trains. Every method gets the same
number of epochs.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.cnn import config as cnn_config
from experiments.cnn import task as cnn
from experiments.common import driver, runner, training
from experiments.common.driver import Options
from experiments.common.report import format as fmt
from experiments.common.report import html, plots
from experiments.common.report.metrics import MetricsWriter
from experiments.common.report.summary import lookup
from experiments.common.training import ConfigError
from experiments.common.training.config import METHODS, Rule, Stage

# what compression is counted by -> its key in a row, and its words
_RATES = {
    "weights": ("rate", "dense weights / kept weights"),
    "bytes": ("bytes_rate", "dense bytes / packed bytes"),
    "multiplications": ("multiplications_rate", "dense multiplications / those left"),
}
NAMES = {"admm": "ADMM", "one_shot": "one-shot", "gradual": "gradual magnitude", "dense": "dense, same budget"}


@dataclass(frozen=True)
class Point:
    """One setting of the sweep.

    Attributes:
      name: it in words; part of a folder's name.
      rules: what it asks of the weights.
      family: points of a family are one curve; "" where the method alone names it.
      stages: how ADMM gets there in several steps, the last one's rules being `rules`; together they take the epochs of
        the base's one stage. `()`: that stage.
    """

    name: str
    rules: tuple[Rule, ...]
    family: str = ""
    stages: tuple[Stage, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config:
    """One sweep.

    Attributes:
      base: the experiment; its plan has one stage, whose rules the points replace.
      points: the settings, such as rates.
      methods: among "admm", "one_shot", "gradual" and "dense" (the same extra epochs without constraints).
      seeds: every point is run with each.
      against: what compression is counted by: "weights" (constrained weights that are not zero), "bytes" (packed) or
        "multiplications" (of the whole network for one image).
      budgets: byte rates at which the page compares the families: every curve's accuracy there, see `at_bytes`.
      variant: its name.
    """

    base: cnn_config.Config
    points: tuple[Point, ...]
    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (0, 1, 2)
    against: str = "weights"
    budgets: tuple[float, ...] = ()
    variant: str = ""

    @property
    def seed(self) -> int:
        """The first seed, under which a summary of all stands."""
        return self.seeds[0]

    def __post_init__(self) -> None:
        names = [p.name for p in self.points]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"points must have names of their own, at least one; got {names}")
        if not self.methods or not set(self.methods) <= set(METHODS):
            raise ConfigError(f"methods={self.methods} is impossible; they must be among {', '.join(METHODS)}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds={self.seeds} is impossible; give different ones, at least one")
        if self.against not in _RATES:
            raise ConfigError(f"against={self.against!r} is impossible; it must be {', '.join(_RATES)}")
        if any(b < 1 for b in self.budgets):
            raise ConfigError(f"budgets={self.budgets} is impossible; a budget is dense bytes over packed, at least 1")
        if self.base.rules:
            raise ConfigError(f"base.rules={self.base.rules!r}: the points of a sweep give the rules; leave it empty")
        if len(self.base.plan.stages) != 1 or self.base.plan.baselines:
            raise ConfigError(
                "base.plan must have one stage and no baselines: the sweep's methods are compared instead"
            )
        wanted = _epochs(self.base.plan.stages)
        for p in self.points:
            if p.stages and p.stages[-1].rules != p.rules:
                raise ConfigError(f"point {p.name!r}: the rules of its last stage are not its rules")
            if p.stages and _epochs(p.stages) != wanted:
                raise ConfigError(
                    f"point {p.name!r}: its stages have {_epochs(p.stages)} epochs of ADMM and of retraining; all "
                    f"points have those of base.plan, {wanted}"
                )


def _epochs(stages: tuple[Stage, ...]) -> tuple[int, int]:
    """Epochs of ADMM and of retraining."""
    return sum(s.admm.epochs for s in stages), sum(s.retrain.epochs for s in stages)


class Run(NamedTuple):
    """One run of the sweep: its folder's name, and what it is."""

    name: str
    config: cnn_config.Config
    method: str
    point: str
    seed: int


def read(config: Any) -> Config:
    """The frozen config of a ConfigDict or nested dict."""
    return training.parse(Config, config)


def runs(config: Config, workdir: Path) -> list[Run]:
    """All runs, those of a seed together; `dense` is run once a seed.

    All start from the dense network of `base.init_from`, or from that of their seed's first run.
    """
    todo: list[Run] = []
    for seed in config.seeds:
        source = config.base.init_from
        wanted = [("dense", p) for p in config.points[:1] if "dense" in config.methods]
        wanted += [(m, p) for p in config.points for m in config.methods if m != "dense"]
        for method, point in wanted:
            name = f"dense-s{seed}" if method == "dense" else f"{method}-{point.name}-s{seed}"
            single = dataclasses.replace(config.base.plan.stages[0], rules=point.rules)
            stages = point.stages if point.stages and method == "admm" else (single,)
            plan = dataclasses.replace(config.base.plan, method=method, stages=stages)
            # the network at `source` was read from the published weights already, and trained on
            model = dataclasses.replace(config.base.model, checkpoint="") if source else config.base.model
            one = dataclasses.replace(config.base, plan=plan, seed=seed, init_from=source, model=model)
            todo.append(Run(name, one, method, "" if method == "dense" else point.name, seed))
            source = source or str(workdir / "runs" / name)
    return todo


@runner.once
def run(config: Config, options: Options) -> dict[str, Any]:
    """Runs what is left of the sweep, and draws it; where one fails, the runs done so far stay done."""
    todo = runs(config, options.workdir)
    for r in todo:
        if r.seed == config.seeds[0]:  # every point's rules and data, before anything is trained
            job, _ = cnn.make_job(dataclasses.replace(r.config, init_from=""), options)
            training.check_phases(job, cnn.plan_phases(r.config))
    driver.claim(options.workdir, dataclasses.asdict(config))
    done = []
    for number, r in enumerate(todo):
        print(f"[{number + 1}/{len(todo)}] {r.name}", flush=True)
        there = dataclasses.replace(options, workdir=options.workdir / "runs" / r.name)
        done.append((r, cnn.train_and_evaluate(r.config, there)))
    return conclude(config, options, done)


def evaluate(config: Config, options: Options) -> dict[str, Any]:
    """A sweep has no model of its own."""
    raise ConfigError("a sweep has no model; evaluate one of the runs below runs/ with experiments.cnn --mode=eval")


def table(config: Config, done: list[tuple[Run, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a method and point: rate, and accuracies in the order of the seeds with their mean and spread.

    `spread` is the sample standard deviation, null for a single seed.
    """
    rows = []
    families = {p.name: p.family for p in config.points}
    for method in config.methods:
        for point in [""] if method == "dense" else families:
            mine = [s for r, s in done if r.method == method and r.point == point]
            key = "dense_same_budget" if method == "dense" else "compressed"
            values = [s["metric"][key] for s in mine]
            rows.append(
                {
                    "method": method,
                    "point": point or None,
                    "family": families.get(point) or None,
                    "rate": None if method == "dense" else mine[0]["rate"]["constrained_weights"],
                    "bytes_rate": None if method == "dense" else float(np.mean([s["rate"]["bytes"] for s in mine])),
                    "multiplications_rate": None if method == "dense" else _fewer_multiplications(mine),
                    "accuracy": values,
                    "mean": float(np.mean(values)),
                    "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                }
            )
    return rows


def _fewer_multiplications(mine: list[dict[str, Any]]) -> float | None:
    rates = [lookup(s, "cnn.operations.rate") for s in mine]
    return None if None in rates else float(np.mean(rates))


def at_bytes(rows: list[dict[str, Any]], budgets: Sequence[float]) -> list[dict[str, Any]]:
    """Accuracy of every curve (a family and a method) at given byte rates: mean over seeds, linear in log(bytes).

    null outside the rates that the curve was measured at: nothing is extrapolated. Of points of one rate, the best.
    """
    curves: dict[tuple[str | None, str], dict[float, float]] = {}
    for row in rows:
        if row["bytes_rate"] is not None:
            curve = curves.setdefault((row["family"], row["method"]), {})
            curve[row["bytes_rate"]] = max(row["mean"], curve.get(row["bytes_rate"], 0.0))
    out = []
    for (family, method), curve in curves.items():
        x = sorted(curve)
        for budget in budgets:
            inside = x[0] <= budget <= x[-1]
            value = float(np.interp(np.log(budget), np.log(x), [curve[r] for r in x])) if inside else None
            out.append({"family": family, "method": method, "bytes_rate": budget, "accuracy": value})
    return out


def conclude(config: Config, options: Options, done: list[tuple[Run, dict[str, Any]]]) -> dict[str, Any]:
    """Writes the table, the plot, the page and the summary.

    The summary's metrics are means over seeds at the point of highest compression: `compressed` is the first method's.
    """
    workdir, rows = options.workdir, table(config, done)
    with MetricsWriter(workdir / "metrics.jsonl") as writer:
        for number, (r, s) in enumerate(done):
            writer.write(number, r.method, run=r.name, seed=r.seed, rate=s["rate"], metric=s["metric"])
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["method"] != "dense":
            curves.setdefault(", ".join(filter(None, (row["family"], _method_name(config, row)))), []).append(row)
    x, words = _RATES[config.against]
    if any(row[x] is None for row in rows if row["method"] != "dense"):
        raise ConfigError(f"against={config.against!r}: a run below {workdir} does not say; use another --workdir")
    equal = at_bytes(rows, config.budgets)
    dense = [s["metric"]["dense"] for r, s in _first_of_each_seed(done)]
    controls = {"dense": dense}
    for row in rows:
        if row["method"] == "dense":
            controls[NAMES["dense"]] = row["accuracy"]
    pictures = []
    if curves:
        methods = {name: ([r[x] for r in at], [r["accuracy"] for r in at]) for name, at in curves.items()}
        label = f"compression ({words}, log scale)"
        path = plots.metric_against_rate(workdir / "sweep.png", methods, controls=controls, xlabel=label)
        text = "Mean over seeds with the sample standard deviation. Same epochs for every method."
        text += f" Compression is counted in {config.against}."
        pictures.append(html.Picture(path, "Accuracy against compression", text))
    first = done[0][1]
    top = max((row for row in rows if row[x] is not None), key=lambda row: row[x], default=None)

    def mean(method: str) -> float | None:
        point = None if method == "dense" or top is None else top["point"]
        return next((row["mean"] for row in rows if (row["method"], row["point"]) == (method, point)), None)

    main = config.methods[0]
    told = runner.summary(
        "sweep",
        config,
        options,
        dataset=first["dataset"],
        metric=runner.metric(
            "accuracy",
            mean(main) if main != "dense" else None,
            dense=float(np.mean(dense)),
            dense_same_budget=mean("dense"),
            one_shot=mean("one_shot"),
        ),
        seconds=sum(s["seconds"] for _, s in done),
        block={"seeds": list(config.seeds), "rows": rows, "at_bytes": equal},
    )
    told["rate"]["constrained_weights"] = top["rate"] if top else None
    told["violations"] = sum(s["violations"] or 0 for _, s in done)
    summary = runner.conclude(
        told,
        options,
        pictures=pictures,
        sections=[("Runs", _html_table(config, rows)), *([("At equal bytes", _equal(config, equal))] if equal else [])],
        links=[(r.name, f"runs/{r.name}/report.html") for r, _ in done],
    )
    print("\n".join(map(_line, rows)))
    print(f"Report: {workdir / 'report.html'}")
    return summary


def _method_name(config: Config, row: dict[str, Any]) -> str | None:
    """The method as part of a curve's name: left out where families name the curves and there is one method."""
    several = len([m for m in config.methods if m != "dense"]) > 1
    return NAMES[row["method"]] if several or not row["family"] else None


def _first_of_each_seed(done: list[tuple[Run, dict[str, Any]]]) -> list[tuple[Run, dict[str, Any]]]:
    seen: dict[int, tuple[Run, dict[str, Any]]] = {}
    for r, s in done:
        seen.setdefault(r.seed, (r, s))
    return list(seen.values())


def _html_table(config: Config, rows: list[dict[str, Any]]) -> html.Table:
    fewer = ("fewer weights", "fewer bytes", "fewer multiplications")
    header = ("method", "point", *fewer, "mean", "spread", *(f"seed {s}" for s in config.seeds))
    body = [
        (
            NAMES[row["method"]],
            " ".join(filter(None, (row["family"], row["point"]))) or "-",
            fmt.rate(row["rate"]),
            fmt.rate(row["bytes_rate"]),
            fmt.rate(row["multiplications_rate"]),
            fmt.percent(row["mean"]),
            fmt.percent(row["spread"]),
            *(fmt.percent(a) for a in row["accuracy"]),
        )
        for row in rows
    ]
    return html.Table(header, body, (False, False, *[True] * (len(header) - 2)))


def _equal(config: Config, equal: list[dict[str, Any]]) -> html.Table:
    """A row a curve, a column a budget."""
    found: dict[str, list[str]] = {}
    for e in equal:
        name = ", ".join(filter(None, (e["family"], _method_name(config, e))))
        found.setdefault(name, []).append(fmt.percent(e["accuracy"]))
    header = ("curve", *(f"{fmt.rate(b)} fewer bytes" for b in config.budgets))
    return html.Table(header, [(name, *cells) for name, cells in found.items()], (False, *[True] * len(config.budgets)))


def _line(row: dict[str, Any]) -> str:
    mean, spread = fmt.percent(row["mean"]), fmt.percent(row["spread"])
    rates = f"{fmt.rate(row['rate']):>8}{fmt.rate(row['bytes_rate']):>8}"
    return f"{NAMES[row['method']]:<20}{row['point'] or '':<24}{rates}  {mean} +- {spread}"
