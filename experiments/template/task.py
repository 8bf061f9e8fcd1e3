"""The task of the template: what is trained on what, and what is written about it.

    python -m experiments.template --config=configs/template.py:digits --workdir=runs/template

`runner` and `artifacts` do what every driver does; here stands what is this driver's own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import artifacts, data, driver, models, runner, training
from experiments.common.driver import Options
from experiments.common.settings import check_batch
from experiments.common.training import ConfigError, Weights, mesh, phases, state
from experiments.template import measures, page
from experiments.template.config import NAME, Config

# -- what is trained ---------------------------------------------------------------------------------------------------


def load_data(config: Config, split: str, data_dir: str | None) -> data.Dataset:
    """A split of the images.

    Raises:
      ConfigError, DataNotFoundError, DataFileError: what is impossible, missing or damaged.
    """
    try:
        whole = data.load(config.data.name, split, data_dir)
    except (data.DataNotFoundError, data.DataFileError):
        raise
    except ValueError as error:
        raise ConfigError(f"data: {error}") from None
    return whole.take(slice(0, config.data.train or None)) if split == "train" else whole


def arrays(dataset: data.Dataset) -> dict[str, np.ndarray]:
    """Inputs and labels as the training takes them."""
    return {"inputs": np.asarray(dataset.inputs), "labels": np.asarray(dataset.labels)}


def make_task(config: Config, info: data.Info) -> tuple[Any, training.Task]:
    """The network, and its loss and score on images."""
    try:
        model = models.build(config.model, classes=info.classes)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    return model, training.classification(model.apply, lambda x: data.augment.normalise(x, info.mean, info.std))


def make_job(config: Config, options: Options) -> tuple[training.Job, data.Info]:
    """Everything the training needs."""
    train, test = (load_data(config, split, options.data_dir) for split in ("train", "test"))
    model, task = make_task(config, train.info)
    check_batch(config.batch, len(train), "training examples")
    variables = model.init(jax.random.key(config.seed), jnp.zeros((1, *train.info.shape)))
    job = training.Job(
        task=task,
        first=Weights({"params": variables["params"]}, {k: v for k, v in variables.items() if k != "params"}, {}),
        train=arrays(train),
        test=arrays(test),
        seed=config.seed,
        batch=config.batch,
        eval_batch=config.eval_batch,
        placement=mesh.for_batch(options.mesh, config.batch),
        save_steps=config.save.steps,
        save_seconds=config.save.seconds,
    )
    return job, train.info


# -- the run -----------------------------------------------------------------------------------------------------------


@runner.once
def train_and_evaluate(config: Config, options: Options) -> dict[str, Any]:
    """Trains and compresses an image classifier: what is left of it."""
    todo = phases.plan(config.plan)
    job, info = make_job(config, options)
    outcome = runner.train(config, options, job, todo)
    last = next(p for p in todo if p.name == phases.final(config.plan))
    dense, result = (outcome.weights(job, p) for p in (todo[0], last))
    if jax.process_index() != 0:
        return {}
    results, described = outcome.results, {"name": config.model, "options": {}}
    path, way = options.workdir / artifacts.MODEL, phases.schedule(todo, last.name)
    stored = artifacts.save(path, result, last.rules, described, {"driver": NAME, "classes": info.classes}, way)
    model, _ = make_task(config, info)
    networks = {"dense": dense, "compressed": result}
    by_class = {name: measures.by_class(model, w, job.test, info) for name, w in networks.items()}
    summary = runner.summary(
        NAME,
        config,
        options,
        dataset=driver.dataset(info, len(job.train["labels"]), len(job.test["labels"])),
        metric=runner.metric(
            "accuracy",
            results[last.name]["end"]["accuracy"] if last.rules else None,
            dense=results[phases.DENSE]["end"]["accuracy"],
            hardened=results[last.name]["start"]["accuracy"] if last.rules else None,
        ),
        stored=stored,
        residual=runner.residual(results.values()),
        seconds=outcome.seconds,
        block={"selection": "the last epoch; the test set chooses nothing", "by_class": by_class, "phases": results},
    )
    return runner.conclude(
        summary,
        options,
        layers=stored.layers,
        pictures=artifacts.pictures(options.workdir, dense.params, result.params, last.rules),
        sections=page.sections(by_class),
    )


# -- evaluation of a finished run --------------------------------------------------------------------------------------


def evaluate(config: Config, options: Options) -> dict[str, Any]:
    """Evaluates a finished run's compressed model on a split of the config's data.

    Raises:
      ConfigError: the run is not finished, or the data do not fit the network.
    """
    stored = runner.model_of(options.workdir)
    dataset = load_data(config, options.split, options.data_dir)
    model, task = make_task(config, dataset.info)
    wanted = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *dataset.info.shape))))
    variables = runner.fitting(stored, wanted, f"{config.model} on images {dataset.info.shape}")
    score = state.make_evaluate(task, config.eval_batch)
    others = {k: v for k, v in variables.items() if k != "params"}
    figures = score({"params": variables["params"]}, others, jax.tree.map(jnp.asarray, arrays(dataset)))
    return runner.evaluated(
        NAME,
        config,
        options,
        dataset=driver.dataset(dataset.info, None, len(dataset)),
        metric=runner.metric("accuracy", figures["accuracy"]),
        stored=stored,
        block={"loss": figures["loss"]},
    )
