"""What every driver does around its own work: a finished run is left as it is, files are written, the summary last.

    @runner.once
    def run(config, options):
        outcome = runner.train(config, options, job, phases)
        stored = artifacts.save(...)
        summary = runner.summary("mine", config, options, dataset=..., metric=..., stored=stored, block={...})
        return runner.conclude(summary, options, layers=stored.layers, sections=[...])
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.common import artifacts, driver, training
from experiments.common.artifacts import Stored
from experiments.common.driver import Function, Options
from experiments.common.report import console, html
from experiments.common.report.environment import run_record
from experiments.common.report.summary import make_summary, write_summary
from experiments.common.settings import Paper
from experiments.common.training import ConfigError


def once(run: Function) -> Function:
    """A driver's `run(config, options)`, which does nothing where the work directory holds this config's finished run.

    Args:
      run: runs the experiment, or what is left of it, and writes everything about it into the work directory.

    Returns:
      A function that returns the run's summary; `{}` on all but the first of several processes. It raises one of
      `driver.USER_ERRORS`, among them `ConfigError` where the work directory holds a run of another config.
    """

    @functools.wraps(run)
    def unless_finished(config: Any, options: Options) -> dict[str, Any]:
        found = driver.finished(options.workdir, dataclasses.asdict(config))
        return run(config, options) if found is None else found

    return unless_finished


def train(config: Any, options: Options, job: training.Job, phases: tuple[training.Phase, ...]) -> training.Outcome:
    """Trains what is left of the phases, with a progress bar. What is impossible is refused before anything is written.

    Raises:
      ConfigError: phases that cannot be run, or a work directory of another config.
    """
    training.check_phases(job, phases)
    first = jax.process_index() == 0
    if first:
        driver.claim(options.workdir, dataclasses.asdict(config))
    with training.Display(training.total_steps(job, phases), quiet=not first) as display:
        outcome = training.train(job, phases, options.workdir, display)
        display.say("trained; packing, timing and drawing the report")
        return outcome


def metric(
    name: str,
    compressed: float | None,
    *,
    higher_is_better: bool = True,
    dense: float | None = None,
    dense_same_budget: float | None = None,
    one_shot: float | None = None,
    hardened: float | None = None,
) -> dict[str, Any]:
    """The `metric` section of a summary; a method that was not run is None."""
    others = {"dense": dense, "dense_same_budget": dense_same_budget, "one_shot": one_shot, "hardened": hardened}
    return {"name": name, "higher_is_better": higher_is_better, **others, "compressed": compressed}


def residual(results: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """The `residual` section: that of the last phase that has residuals, the largest over its leaves."""
    found = [r for r in results if r.get("primal")]
    return {k: max(found[-1][k].values()) if found else None for k in ("primal", "dual")}


def summary(
    name: str,
    config: Any,
    options: Options,
    *,
    dataset: Mapping[str, Any],
    metric: Mapping[str, Any],
    block: Mapping[str, Any],
    stored: Stored | None = None,
    residual: Mapping[str, float | None] | None = None,
    latency_ms: Mapping[str, float] | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """A checked summary of a run.

    Args:
      name: of the driver.
      config: its frozen config, with `variant`, `seed` and, where there is a published figure, `paper`.
      options: the flags.
      dataset: see `driver.dataset`.
      metric: see `metric`.
      block: the driver's own figures; the command, date, machine and versions are added as `run`.
      stored: the compressed model, for rates, bytes and violations.
      residual: see `residual`.
      latency_ms: of the dense and the compressed network.
      seconds: of the whole run.
    """
    paper = getattr(config, "paper", None)
    given = isinstance(paper, Paper) and bool(paper.quantity)
    return make_summary(
        driver=name,
        variant=config.variant,
        seed=config.seed,
        dataset=dataset,
        metric=metric,
        rate=stored and stored.rate,
        bytes=stored and stored.size,
        residual=residual,
        violations=stored and stored.violations,
        latency_ms=latency_ms,
        seconds=seconds,
        paper=dataclasses.asdict(paper) if given else None,  # type: ignore[arg-type]
        **{name: {**block, "run": run_record(options.command)}},
    )


def conclude(
    summary: Mapping[str, Any], options: Options, *, links: Sequence[tuple[str, str]] = (), **page: Any
) -> dict[str, Any]:
    """Writes the report and, last, the summary, which says that the run is finished; prints both.

    Args:
      summary: of the run.
      options: the flags.
      links: files beside the page, in addition to the usual ones.
      **page: the other fields of `html.Page`: layers, pictures, first, sections, badge, notice.

    Returns:
      The summary.
    """
    workdir = options.workdir
    config = json.loads((workdir / "config.json").read_text())
    content = html.Page(summary=summary, config=config, links=[*artifacts.links(workdir), *links], **page)
    html.write_report(workdir / "report.html", content)
    write_summary(workdir / "summary.json", summary)
    console.print_report(summary, page.get("layers", ()))
    return dict(summary)


# -- evaluation of a finished run --------------------------------------------------------------------------------------


def model_of(workdir: Path) -> Stored:
    """The compressed model of a finished run.

    Raises:
      ConfigError: there is none.
    """
    path = workdir / artifacts.MODEL
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; finish the run first (--mode=run)")
    return artifacts.read(path)


def fitting(stored: Stored, wanted: Any, what: str) -> Any:
    """The stored leaves as jax arrays, in the shapes that a network needs.

    Args:
      stored: the compressed model.
      wanted: the network's variables, as arrays or shapes.
      what: the network in words, for the message.

    Raises:
      ConfigError: the shapes differ.
    """
    variables = jax.tree.map(jnp.asarray, stored.saved.params)
    if jax.tree.map(jnp.shape, wanted) != jax.tree.map(jnp.shape, variables):
        raise ConfigError(f"the stored weights do not fit {what}")
    return variables


def evaluated(
    name: str,
    config: Any,
    options: Options,
    *,
    dataset: Mapping[str, Any],
    metric: Mapping[str, Any],
    stored: Stored,
    block: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes what an evaluation found to `<workdir>/eval/<data set>-<split>/summary.json`; the summary is returned."""
    facts = {"mode": "eval", "split": options.split, "model": str(options.workdir / artifacts.MODEL), **block}
    told = summary(name, config, options, dataset=dataset, metric=metric, block=facts, stored=stored)
    told["paper"] = dict.fromkeys(told["paper"])
    folder = options.workdir / "eval" / f"{config.data.name}-{options.split}"
    folder.mkdir(parents=True, exist_ok=True)
    write_summary(folder / "summary.json", told)
    value = "none" if metric["compressed"] is None else f"{metric['compressed']:.4f}"
    print(f"{config.data.name} {options.split}: {metric['name']} {value}; written to {folder / 'summary.json'}")
    return told
