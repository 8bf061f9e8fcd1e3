"""Every variant can be read, fits its network, and has the rate of its name."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from compressx.rules import resolve
from configs import cnn as configs
from experiments.cnn import config as cnn_config
from experiments.common import models
from experiments.common.training import phases

SHAPES = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "cifar10_subset": (32, 32, 3)}


@functools.cache
def _shapes(model: str, options: str, data: str) -> Any:
    """The parameters' shapes: many variants share a network, and tracing it is most of the time."""
    x = jax.ShapeDtypeStruct((1, *SHAPES[data]), jnp.float32)
    built = models.build(model, classes=10, **json.loads(options))
    return {"params": jax.eval_shape(built.init, jax.random.key(0), x)["params"]}


@pytest.mark.parametrize("variant", [*configs.VARIANTS, *(f"{v}_tiny" for v in configs.VARIANTS)])
def test_every_variant_fits_its_network(variant) -> None:
    config = cnn_config.read(configs.get_config(variant))
    assert config.variant == variant
    params = _shapes(config.model.name, json.dumps(dict(config.model.options)), config.data.name)
    todo = phases.plan(config.plan)
    given = [p.rules for p in todo if p.rules is not None]
    specs = [[(pattern, c and c.spec) for pattern, c in rules] for rules in given]
    for n, rules in enumerate(given):
        if specs.index(specs[n]) == n:  # a stage's phases have the same rules
            resolve(rules, params)
    rate = variant.removesuffix("_tiny").rpartition("_")[2]
    if rate.endswith("x"):
        assert _rate(todo, params) >= float(rate[:-1]) * 0.999  # a tiny network rounds its density


def _rate(todo, params) -> float:
    """Weights of the constrained leaves over those that the last rules keep, from the specs alone."""
    last = [p for p in todo if p.rules is not None and p.name.startswith("retrain")][-1]
    leaves = jax.tree.leaves(params)
    total = kept = 0
    for b in resolve(last.rules, params):
        size = sum(leaves[i].size for i in b.indices)
        spec = b.constraint.spec
        total += size
        if spec["kind"] == "filters_and_columns":
            kept += spec["keep_filters"] * spec["keep_columns"]
        elif spec["kind"] == "pattern_connectivity":  # 4 weights of every kernel that is kept
            kept += sum(4 * round(spec["density"] * leaves[i].size / 9) for i in b.indices)
        else:
            kept += spec["keep"] or round(spec["density"] * size)
    return total / kept


def test_tiny_is_tiny() -> None:
    for variant in configs.VARIANTS:
        config = cnn_config.read(configs.get_config(f"{variant}_tiny"))
        assert config.data.train <= 96
        todo = phases.plan(config.plan)
        assert sum(p.fit.epochs for p in todo) <= 4 * len(todo)


def test_an_unknown_variant_lists_the_known() -> None:
    with pytest.raises(ValueError, match="no variant 'digitz'; there are digits, mnist_lenet5_unstructured"):
        configs.get_config("digitz")


def test_a_misspelt_setting_is_refused() -> None:
    config = configs.get_config("digits")
    with pytest.raises(AttributeError, match="sed"):
        config.sed = 1
