"""A chest X-ray detector compressed by filters, columns or both: dense -> ADMM -> harden -> retrain -> compact.

    python -m experiments.pneumonia --config=configs/pneumonia.py:opacities --workdir=runs/pneumonia

One run trains one dense network and from it any number of points, each a kind of structure at a rate, so that all are
compared on the same weights and images. The confidence above which boxes count is chosen for every network on the
validation images; the test images choose nothing. `pneumonia_data` reads the images, `pneumonia_score` judges networks,
`pneumonia_page` draws the report.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from compressx import compaction
from experiments.common import artifacts, driver, models, runner, training
from experiments.common.driver import Options
from experiments.common.models import darknet, initial, yolov3
from experiments.common.settings import check_batch
from experiments.common.training import ConfigError, Outcome, Phase, Weights, mesh, phases
from experiments.pneumonia import data as pneumonia_data
from experiments.pneumonia import measures as pneumonia_score
from experiments.pneumonia import page as pneumonia_page
from experiments.pneumonia.config import Config
from experiments.pneumonia.data import Task

QUIET = -4.0  # first logit of every objectness: 2 %
PATTERN = r"params/(conv_\d+/kernel|bn_\d+/(scale|bias)|linear/kernel)"  # all that touches a channel


# -- what is trained ---------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """The network, its channels, and the phases of the run.

    Attributes:
      model: the flax module.
      first: its first weights.
      groups: coupled channels, found from the network.
      amounts: point name -> what stays.
      phases: all of them.
    """

    model: Any
    first: Weights
    groups: tuple[compaction.Group, ...]
    amounts: dict[str, compaction.Amounts]
    phases: tuple[Phase, ...]


def make_plan(config: Config, task: Task, data_dir: str | None) -> Plan:
    """Builds the network, finds its coupled channels, and turns every point into phases.

    Raises:
      ConfigError: a network or a point that cannot be.
    """
    try:
        model = models.build(config.model.name, classes=task.classes, **config.model.options)
        x = jax.ShapeDtypeStruct((1, *task.shape), jnp.float32)
        variables = initial.draw(model, x, config.seed)
        if task.geometry is not None:
            variables = _quiet(model, variables)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {error}") from None
    if config.model.checkpoint:
        from experiments.common.data import find_file

        path = find_file(config.model.checkpoint, data_dir)
        assert isinstance(model, yolov3.YOLOv3)  # the config refuses a checkpoint for others
        variables, _ = darknet.load_darknet(path, model, task.shape[-1], variables)
    params, rest = {"params": variables["params"]}, {k: v for k, v in variables.items() if k != "params"}
    found = compaction.groups(compaction.channels(model, variables, x))
    convolutions = compaction.kernels(found, variables)
    pattern = PATTERN if "linear" in variables["params"] else PATTERN.replace(r"|linear/kernel", "")
    budget = dataclasses.replace(config.retrain, epochs=config.admm.epochs + config.retrain.epochs)
    todo, amounts = [Phase(phases.DENSE, "dense", "", config.dense)], {}
    for point in config.points:
        try:
            kept = compaction.amounts(
                found, convolutions, point.kind, point.rate, power=config.power, share=config.share
            )
        except ValueError as error:
            raise ConfigError(f"point {point.name}: {error}") from None
        drawn: dict[str, Any] = {"selection": "random", "seed": config.seed} if point.method == "random" else {}
        rules = tuple(compaction.structure_rules(found, params, kept, pattern=pattern, **drawn))
        amounts[point.name] = kept
        if point.method == "admm":
            todo.append(Phase(f"admm_{point.name}", "admm", phases.DENSE, config.admm, rules))
            todo.append(Phase(f"retrain_{point.name}", "retrain", f"admm_{point.name}", config.retrain, rules))
        else:
            todo.append(Phase(f"retrain_{point.name}", "retrain", phases.DENSE, budget, rules))
    if config.same_budget:
        todo.append(Phase(phases.SAME_BUDGET, "dense", phases.DENSE, budget))
    return Plan(model, Weights(params, rest, {}), found, amounts, tuple(todo))


def _quiet(model: Any, variables: dict[str, Any]) -> dict[str, Any]:
    """Heads that start by finding next to nothing: nearly all of their boxes must learn just that."""
    params = dict(variables["params"])
    for number, block in enumerate(model.layers):
        if block.linear:
            name = f"conv_{number}"
            bias = params[name]["bias"].reshape(3, -1).at[:, 4].set(QUIET).reshape(-1)
            params[name] = {**params[name], "bias": bias}
    return {**variables, "params": params}


def make_job(config: Config, task: Task, plan: Plan, options: Options) -> training.Job:
    """Everything the training needs; raises ConfigError."""
    used = len(next(iter(task.train.values())))
    check_batch(config.batch, used, "training examples")
    return training.Job(
        task=pneumonia_data.learning(task, plan.model, config.data, config.positive),
        first=plan.first,
        train=task.train,
        test=task.test,
        validation=task.validation,
        seed=config.seed,
        batch=config.batch,
        eval_batch=config.eval_batch,
        optimizer=config.optimizer,
        placement=mesh.for_batch(options.mesh, config.batch),
        chunk=10,
        save_steps=config.save.steps,
        save_seconds=config.save.seconds,
    )


# -- the run -----------------------------------------------------------------------------------------------------------


@runner.once
def train_and_evaluate(config: Config, options: Options) -> dict[str, Any]:
    """Trains the detector, and every point from it: what is left of it."""
    task = pneumonia_data.load(config.data, options.data_dir)
    plan = make_plan(config, task, options.data_dir)
    job = make_job(config, task, plan, options)
    outcome = runner.train(config, options, job, plan.phases)
    return conclude(config, options, task, plan, job, outcome)


def conclude(
    config: Config, options: Options, task: Task, plan: Plan, job: training.Job, outcome: Outcome
) -> dict[str, Any]:
    """Judges every network, saves the first point's, and writes everything else; the summary last."""
    by_name = {p.name: p for p in plan.phases}

    def weights(name: str) -> Weights:
        return outcome.weights(job, by_name[name])

    judge = pneumonia_score.Judge(task, plan.model, config.eval_batch)
    networks = {"dense": weights(phases.DENSE)}
    head = config.points[0]
    if config.same_budget:
        networks["dense_same_budget"] = weights(phases.SAME_BUDGET)
    for point in config.points:
        networks[point.name] = weights(f"retrain_{point.name}")
    start = by_name[f"retrain_{head.name}"]
    if head.method == "admm":
        assert start.rules is not None
        networks["hardened"] = phases.harden(weights(start.start), start.rules)
    scored = {name: judge.score({**w.params, **w.batch_stats}) for name, w in networks.items()}
    scores = {name: s.facts for name, s in scored.items()}
    dense = {**networks["dense"].params, **networks["dense"].batch_stats}
    sizes = {"dense": pneumonia_score.whole(plan.model, dense, task)}
    for point in config.points:
        w = networks[point.name]
        sizes[point.name] = pneumonia_score.compacted(plan.model, {**w.params, **w.batch_stats}, task)
    measured = {p.name: sizes[p.name] for p in config.points if p == head or p.method == "admm"}
    times = pneumonia_score.times(plan.model, dense, measured, task, config.latency) if config.latency else None
    if jax.process_index() != 0:
        return {}
    last = by_name[f"retrain_{head.name}"]
    facts = {"driver": "pneumonia", "seed": config.seed, **task.facts, "classes": task.classes}
    facts["threshold"] = scores[head.name]["threshold"]
    model = {"name": config.model.name, "options": dict(config.model.options)}
    path, way = options.workdir / artifacts.MODEL, phases.schedule(plan.phases, last.name)
    stored = artifacts.save(path, networks[head.name], last.rules, model, facts, way)
    block: dict[str, Any] = {
        "points": {
            p.name: {
                "kind": p.kind,
                "rate": p.rate,
                "method": p.method,
                "weights_kept": plan.amounts[p.name].weights,
                "rate_kept": plan.amounts[p.name].total / plan.amounts[p.name].weights,
                "scores": scores[p.name],
                "minus_dense": judge.minus(scored[p.name], scored["dense"]),
                "size": sizes[p.name].facts,
                "latency_ms": times.points.get(p.name) if times else None,
            }
            for p in config.points
        },
        "combined_minus": pneumonia_score.combined_minus(config.points, judge, scored),
        "dense": {
            "scores": scores["dense"],
            "size": sizes["dense"].facts,
            "latency_ms": times.dense if times else None,
        },
        "same_budget": scores.get("dense_same_budget"),
        "hardened": scores.get("hardened"),
        "groups": len(plan.groups),
        "data": task.report,
        "latency": times.facts if times else None,
        "selection": "the last epoch; confidences are chosen on validation images",
        "phases": outcome.results,
    }
    block["rows"] = pneumonia_score.rows(block, task.metric, config.seed)

    def value(name: str) -> float | None:
        return scores[name][task.metric] if name in scores else None

    told = runner.summary(
        "pneumonia",
        config,
        options,
        dataset=driver.dataset(task.info, *(len(next(iter(part.values()))) for part in (task.train, task.test))),
        metric=runner.metric(
            task.metric,
            value(head.name),
            dense=value("dense"),
            dense_same_budget=value("dense_same_budget"),
            one_shot=value(dataclasses.replace(head, method="one_shot").name),
            hardened=value("hardened"),
        ),
        stored=stored,
        residual=runner.residual([outcome.results.get(f"admm_{head.name}", {})]),
        latency_ms={"dense": times.dense, "compressed": times.points[head.name]} if times else None,
        seconds=outcome.seconds,
        block=block,
    )
    told["rate"]["constrained_weights"] = block["points"][head.name]["rate_kept"]
    return runner.conclude(
        told,
        options,
        layers=stored.layers,
        pictures=artifacts.pictures(options.workdir, networks["dense"].params, networks[head.name].params, last.rules),
        sections=pneumonia_page.sections(options.workdir, config.points, task, judge, networks, sizes, times, block),
    )


# -- evaluation of a finished run --------------------------------------------------------------------------------------


def evaluate(config: Config, options: Options) -> dict[str, Any]:
    """Judges a finished run's compressed network on a split of the config's data, or of other data of its kind.

    The network, the normalisation, the anchors and the confidence come from the file. The figures go to
    `<workdir>/eval/<data set>-<split>/`.

    Raises:
      ConfigError: the run is not finished, or the data do not fit the network.
    """
    path, stored = options.workdir / artifacts.MODEL, runner.model_of(options.workdir)
    named, facts = stored.saved.model, stored.saved.extra
    if named is None or not isinstance(facts, dict) or facts.get("driver") != "pneumonia":
        raise ConfigError(f"{path} was not written by this driver")
    task = pneumonia_data.load_for(config.data, options.split, options.data_dir, facts, str(path))
    try:
        model = models.build(named["name"], classes=task.classes, **named.get("options", {}))
        x = jax.ShapeDtypeStruct((1, *task.shape), jnp.float32)
        wanted = jax.eval_shape(model.init, jax.random.key(0), x)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    variables = runner.fitting(stored, wanted, f"{named['name']} on images {task.shape}")
    judge = pneumonia_score.Judge(task, model, config.eval_batch)
    figures = judge.score(variables, threshold=float(facts["threshold"])).facts
    return runner.evaluated(
        "pneumonia",
        config,
        options,
        dataset=driver.dataset(task.info, None, len(next(iter(task.test.values())))),
        metric=runner.metric(task.metric, figures[task.metric]),
        stored=stored,
        block={"scores": figures, "data": task.report},
    )
