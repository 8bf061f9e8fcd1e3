"""Which phases a plan has, and that every method gets the same number of epochs."""

import jax.numpy as jnp
import numpy as np
import pytest

from compressx._harden import ConstraintViolation
from compressx._retrain import RetrainState
from compressx.constraints import filters, polarize, quantize, unstructured
from experiments.common.training import phases
from experiments.common.training.config import Admm, ConfigError, Fit, Plan, Stage
from experiments.common.training.phases import Weights

RULES = tuple((("w", {"kind": "unstructured", "keep": k}),) for k in (4, 2))
STAGES = tuple(
    Stage(rules, Admm(epochs=a, lr=1e-3), Fit(epochs=r, lr=1e-4))
    for rules, a, r in zip(RULES, (3, 5), (2, 7), strict=True)
)


def _plan(**more) -> Plan:
    return Plan(Fit(epochs=4), STAGES, **more)


def _shape(todo) -> list[tuple[str, str, str, int]]:
    return [(p.name, p.kind, p.start, p.fit.epochs) for p in todo]


def test_stages_follow_one_another_inside_each_other() -> None:
    todo = phases.plan(_plan())
    assert _shape(todo) == [
        ("dense", "dense", "", 4),
        ("admm_1", "admm", "dense", 3),
        ("retrain_1", "retrain", "admm_1", 2),
        ("admm_2", "admm", "retrain_1", 5),
        ("retrain_2", "retrain", "admm_2", 7),
    ]
    assert todo[1].within is None
    assert [str(c) for _, c in todo[3].within] == [str(c) for _, c in todo[1].rules]
    assert phases.final(_plan()) == "retrain_2"


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        ("one_shot", [("one_shot", "retrain", "dense", 17)]),
        ("dense", [("dense_same_budget", "dense", "dense", 17)]),
        ("gradual", [("gradual", "gradual", "dense", 8), ("gradual_retrain", "retrain", "gradual", 9)]),
    ],
)
def test_every_method_gets_the_same_epochs(method, shape) -> None:
    todo = phases.plan(_plan(method=method))
    assert _shape(todo)[1:] == shape
    assert sum(p.fit.epochs for p in todo[1:]) == 3 + 2 + 5 + 7
    assert phases.final(_plan(method=method)) == todo[-1].name
    if method != "dense":
        assert todo[-1].rules[0][1].spec["keep"] == 2  # the last stage's, one-shot


def test_the_schedule_is_that_of_admm_in_the_words_of_the_library() -> None:
    fit = Admm(rho=((".*", 0.1),), rho_schedule="constant", every=7, refresh_every=2)
    todo = phases.plan(Plan(Fit(), (Stage(RULES[0], fit, Fit()),), baselines=("one_shot", "gradual")))
    assert phases.schedule(todo, "retrain") == {"rho": ((".*", 0.1),), "every": 7, "refresh_every": 2}
    assert phases.schedule(phases.plan(_plan()), "retrain_2") == {"refresh_every": None}  # rho moves, once an epoch
    for name in ("one_shot", "gradual_retrain", "dense", "absent"):
        assert phases.schedule(todo, name) is None


def test_baselines_come_after_and_start_from_the_same_weights() -> None:
    todo = phases.plan(_plan(baselines=("one_shot", "dense_same_budget")))
    assert [(p.name, p.start) for p in todo[5:]] == [("one_shot", "dense"), ("dense_same_budget", "dense")]


@pytest.mark.parametrize(("method", "baseline"), [("one_shot", "one_shot"), ("dense", "dense_same_budget")])
def test_a_baseline_that_is_the_method_is_refused(method, baseline) -> None:
    with pytest.raises(ConfigError, match="is the method itself"):
        phases.plan(_plan(method=method, baselines=(baseline,)))


def test_a_bad_constraint_names_its_rule() -> None:
    with pytest.raises(ConfigError, match="rule 'w': unknown constraint 'magic'"):
        phases.build_rules((("w", {"kind": "magic"}),))
    with pytest.raises(ConfigError, match="rule 'w': .*density must be in"):
        phases.build_rules((("w", {"kind": "unstructured", "density": 2.0}),))


def test_hardening_keeps_the_largest_and_the_structure() -> None:
    weights = Weights({"w": jnp.array([3.0, -1.0, 2.0])}, {}, {})
    hard = phases.harden(weights, (("w", unstructured(keep=2)),))
    np.testing.assert_array_equal(hard.params["w"], [3.0, 0.0, 2.0])
    assert hard.structure == {"w": ((),)}
    again = phases.harden(hard, (("w", unstructured(keep=2)),))
    np.testing.assert_array_equal(again.params["w"], hard.params["w"])


def test_hardening_refuses_nan_by_name() -> None:
    with pytest.raises(ValueError, match=r"^w \(2,\): 1 weight values are NaN"):
        phases.harden(Weights({"w": jnp.array([jnp.nan, 1.0])}, {}, {}), (("w", unstructured(keep=1)),))


def test_weights_that_left_their_set_are_a_violation() -> None:
    rules = (("w", filters(keep=1)),)
    outside = Weights({"w": jnp.array([[3.0, 1.0], [1.0, 1.0]])}, {}, {"w": ((),)})
    with pytest.raises(ConstraintViolation, match="w: 2 entries outside"):
        phases.settle(outside, rules, RetrainState({"w": jnp.ones((2, 2), bool)}, {"w": ((),)}))


def test_a_scale_that_retraining_tuned_is_kept_and_signs_stay_where_they_were(rng) -> None:
    rules = (("w", polarize(2) & quantize(8, grid="cells")),)
    hard = phases.harden(Weights({"w": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)}, {}, {}), rules)
    signs, before = hard.structure["w"]
    piece = RetrainState({"w": rules[0][1].freeze(hard.params["w"], hard.structure["w"])}, hard.structure)
    moved = hard._replace(params={"w": hard.params["w"] * 1.01 + 1e-5})
    settled = phases.settle(moved, rules, piece)
    same, after = settled.structure["w"]
    np.testing.assert_array_equal(same.negative, signs.negative)
    np.testing.assert_array_equal(same.order, signs.order)
    w, old = np.asarray(settled.params["w"]), np.asarray(hard.params["w"])
    whole = np.rint(w / np.float64(after))
    np.testing.assert_array_equal(np.float32(whole) * np.float32(after), w)  # on the levels that are stored, exactly
    ratio = np.rint(old / np.float64(before))
    assert (np.sign(whole) == np.sign(ratio)).all() and w.max() > old.max()
    phases.harden(settled, rules)  # and so no violation
