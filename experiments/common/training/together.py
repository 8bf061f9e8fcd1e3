"""Several seeds of one run trained as one program: every step, projection and evaluation is a vmap over seeds.

A GPU or TPU that one small network leaves idle trains many at once. On CPU the cores are full already, and one seed
after the other is as fast. What comes out lies in the same files as if each seed had been trained alone, with the same
order of examples and the same keys; sums are taken in another order, so the figures agree to rounding, not to the bit.
A group is saved when it is finished, not before: it is for runs of minutes.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressx._admm import by_set
from compressx._admm import find_state as find_admm
from compressx._harden import ConstraintViolation, count_violations, project, structures
from compressx._retrain import find_state as find_retrain
from compressx._retrain import retract
from compressx.rules import Rules
from experiments.common.data import batches
from experiments.common.report.metrics import MetricsWriter
from experiments.common.training import gradual, optimizers
from experiments.common.training.checkpoint import Checkpoints
from experiments.common.training.config import Admm, ConfigError
from experiments.common.training.job import Job, check_phases, epoch_order, phase_key
from experiments.common.training.loop import Diverged, Outcome
from experiments.common.training.phases import DENSE, Phase, Weights, move_levels
from experiments.common.training.progress import Display
from experiments.common.training.state import Sums, TrainState, all_finite, make_runner, make_step


def train_together(
    jobs: Sequence[Job], phases: tuple[Phase, ...], workdirs: Sequence[Path], display: Display
) -> list[Outcome]:
    """Runs all phases for several jobs that differ in their seed and first weights alone, as one program.

    Args:
      jobs: at least one; on one device (a mesh is for `loop.train`).
      phases: the same for all.
      workdirs: where each seed's `metrics.jsonl` and weights go.
      display: shows the mean over seeds.

    Raises:
      Diverged: a seed's weights are NaN or infinite; names the phase, the epoch and the seeds.
      ConstraintViolation, CheckpointError, ConfigError: as `loop.train`.
    """
    if any(job.placement.mesh is not None for job in jobs):
        raise ConfigError("seeds trained together run on one device; leave --mesh out")
    if jobs[0].task.begin is not None:
        raise ConfigError("examples that follow one another are trained one seed after the other")
    check_phases(jobs[0], phases)
    return _Together(jobs, phases, workdirs, display).go()


def _lift(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(jax.vmap(function))


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _take(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


class _Together:
    """One call of `train_together`; every array of a state has a leading axis of seeds, but the counters of steps."""

    def __init__(
        self, jobs: Sequence[Job], phases: tuple[Phase, ...], workdirs: Sequence[Path], display: Display
    ) -> None:
        self.jobs, self.job, self.phases, self.display = jobs, jobs[0], phases, display
        self.done: dict[str, Weights] = {}
        self.data = {name: jnp.asarray(x) for name, x in self.job.train.items()}
        self.sets = {"": self.job.test} | ({} if self.job.validation is None else {"validation_": self.job.validation})
        self.per_epoch = batches.steps_per_epoch(len(self.job.train["labels"]), self.job.batch)
        self.results: list[dict[str, Any]] = [{} for _ in jobs]
        self.checkpoints = [Checkpoints(folder / "checkpoints") for folder in workdirs]
        self.metrics = [MetricsWriter(folder / "metrics.jsonl") for folder in workdirs]
        self.score = jax.jit(
            jax.vmap(
                lambda params, stats, data, rows, valid: self.job.task.score(
                    params, stats, {name: x[rows] for name, x in data.items()}, valid
                ),
                in_axes=(0, 0, None, None, None),
            )
        )

    def go(self) -> list[Outcome]:
        started, offset = time.monotonic(), 0
        for phase in self.phases:
            self.done[phase.name] = self._run(phase, offset)
            for i, kept in enumerate(self.checkpoints):
                kept.save_weights(phase.name, _take(self.done[phase.name], i))
            offset += phase.fit.epochs * self.per_epoch
        for writer in self.metrics:
            writer.close()
        each = (time.monotonic() - started) / len(self.jobs)
        return [Outcome(r, each, c, None) for r, c in zip(self.results, self.checkpoints, strict=True)]

    def _run(self, phase: Phase, offset: int) -> Weights:
        """A phase from its start to what it leaves."""
        weights = self.done[phase.start] if phase.start else _stack([job.first for job in self.jobs])
        weights = self._enter(phase, weights)
        steps = phase.fit.epochs * self.per_epoch

        def transform(structure: Any) -> Any:
            name, clip = self.job.optimizer, self.job.clip
            return optimizers.of_phase(name, phase, steps, self.per_epoch, structure or None, clip)

        tx = transform(None)
        opt_state = _lift(lambda p, s: transform(s).init(p))(weights.params, weights.structure)
        # counters are the same for all seeds; one copy keeps `lax.cond` a branch, where vmap would take both sides
        single = jax.eval_shape(
            lambda p, s: transform(s).init(p), _take(weights.params, 0), _take(weights.structure, 0)
        )
        axes = jax.tree.map(lambda x: None if x.shape == () and x.dtype == jnp.int32 else 0, single)
        opt_state = jax.tree.map(lambda a, x: x[0] if a is None else x, axes, opt_state, is_leaf=lambda a: a is None)
        state = TrainState(
            weights.params,
            weights.batch_stats,
            opt_state,
            jnp.zeros((), jnp.int32),
            jnp.stack([phase_key(phase, job.seed) for job in self.jobs]),
            self._zero(),
        )
        layout: Any = TrainState(0, 0, axes, None, 0, 0)  # type: ignore[arg-type]
        step = make_step(self.job.task, tx, phase.fit)
        lifted = jax.vmap(step, in_axes=(layout, None, 0, 0), out_axes=layout)
        runner = make_runner(lifted)
        state = jax.device_put(state, jax.devices()[0], may_alias=False)  # the runner donates it
        dense = self.done.get(DENSE)
        teacher = (dense.params, dense.batch_stats) if phase.fit.distill and dense is not None else None
        self._record(phase, offset, 0, state, {"start": True})
        due = optimizers.every(phase.fit, self.per_epoch) if isinstance(phase.fit, Admm) else 0
        done = 0
        for epoch in range(phase.fit.epochs):
            order = jnp.stack([jnp.asarray(epoch_order(phase, epoch, job)) for job in self.jobs])
            end = done + self.per_epoch
            while done < end:
                stop = min(end, (done // due + 1) * due) if phase.kind == "gradual" else end
                state = runner(state, self.data, order, teacher, stop - done)
                done = stop
                if phase.kind == "gradual" and done % due == 0:
                    state = self._prune(phase, state, (done // due) / max(steps // due, 1))
            self._record(phase, offset + done, epoch + 1, state, {})
            state = state._replace(sums=self._zero())
        return self._leave(phase, weights, state)

    def _zero(self) -> Sums:
        return _stack([Sums.zero() for _ in self.jobs])

    def _enter(self, phase: Phase, weights: Weights) -> Weights:
        """The weights a phase trains: hardened for retraining."""
        rules = phase.rules
        if rules is None or phase.kind == "admm":
            return weights if phase.within is not None else weights._replace(structure={})
        if phase.kind == "gradual":
            return weights._replace(structure=_lift(lambda p: structures(p, rules))(weights.params))

        def hard(params: Any, structure: Any) -> Any:
            structure = structure or structures(params, rules)
            z = project(params, rules, structure)
            return z, structure, count_violations(z, rules, structure)

        params, structure, outside = _lift(hard)(weights.params, weights.structure)
        self._check(phase, outside)
        return Weights(params, weights.batch_stats, structure)

    def _leave(self, phase: Phase, weights: Weights, state: TrainState) -> Weights:
        """What the phase leaves: for retraining, exactly inside its sets."""
        params, structure, rules = state.params, weights.structure, phase.rules
        if rules is None:
            structure = {}
        elif phase.kind == "admm":
            admm = find_admm(state.opt_state)
            choose = _lift(lambda p, s: structures(p, rules, admm._replace(structure=s)))
            structure = choose(params, admm.structure)
        elif phase.kind == "retrain":

            def settle(params: Any, structure: Any, piece: Any) -> Any:
                exact = retract(params, rules, piece)
                structure = move_levels(exact, rules, structure)
                return exact, structure, count_violations(exact, rules, structure)

            params, structure, outside = _lift(settle)(params, structure, find_retrain(state.opt_state))
            self._check(phase, outside)
        for r in self.results:
            r[phase.name].setdefault("end", r[phase.name]["start"])
        return Weights(params, state.batch_stats, structure)

    def _check(self, phase: Phase, outside: dict[str, Any]) -> None:
        for name, counts in jax.device_get(outside).items():
            if counts.any():
                seeds = [job.seed for job, n in zip(self.jobs, counts, strict=True) if n]
                raise ConstraintViolation(f"phase {phase.name}, seeds {seeds}: {name} lies outside its sets")

    def _prune(self, phase: Phase, state: TrainState, t: float) -> TrainState:
        assert phase.rules is not None
        rules = phase.rules
        params, piece = jax.vmap(lambda p: gradual.prune(p, rules, t))(state.params)
        return state._replace(params=params, opt_state=gradual.with_piece(state.opt_state, piece))

    def _figures(self, state: TrainState) -> list[dict[str, float]]:
        out: list[dict[str, float]] = [{} for _ in self.jobs]
        for prefix, data in self.sets.items():
            on_device = {name: jnp.asarray(x) for name, x in data.items()}
            n = len(data["labels"])
            parts = [
                self.score(state.params, state.batch_stats, on_device, rows, valid)
                for rows, valid in zip(*batches.cover(n, min(self.job.eval_batch, n)), strict=True)
            ]
            loss, correct, seen = jax.tree.map(lambda *each: sum(each), *jax.device_get(parts))
            for i, figures in enumerate(out):
                figures[f"{prefix}accuracy"] = int(correct[i]) / int(seen[i])
                figures[f"{prefix or 'test_'}loss"] = float(loss[i]) / int(seen[i])
        return out

    def _record(self, phase: Phase, global_step: int, epoch: int, state: TrainState, start: dict[str, bool]) -> None:
        """One record a seed, as `loop` writes them."""
        if not start and not bool(all_finite((state.params, state.batch_stats))):
            finite = [bool(all_finite(_take(state.params, i))) for i in range(len(self.jobs))]
            seeds = [job.seed for job, ok in zip(self.jobs, finite, strict=True) if not ok]
            raise Diverged(f"phase {phase.name}, epoch {epoch}, seeds {seeds}: weights are NaN or infinite")
        figures = self._figures(state)
        residuals: list[dict[str, Any]] = [{} for _ in self.jobs]
        if phase.kind == "admm" and not start:
            residuals = _residuals(find_admm(state.opt_state), len(self.jobs), phase.rules or ())
        loss, correct, seen = jax.device_get(state.sums)
        shown = []
        for i, writer in enumerate(self.metrics):
            values: dict[str, Any] = dict(figures[i])
            if start:
                self.results[i][phase.name] = {"start": figures[i]}
            else:
                trained = {"loss": float(loss[i]) / int(seen[i]), "train_accuracy": int(correct[i]) / int(seen[i])}
                values = trained | values
                self.results[i][phase.name] |= {"end": dict(values)}
                self.results[i][phase.name] |= {k: v for k, v in residuals[i].items() if k in ("primal", "dual")}
                values |= residuals[i]
                shown.append((trained["loss"], figures[i]["accuracy"]))
            writer.write(global_step, phase.name, epoch=epoch, **values)
        if shown:
            mean = np.mean(shown, axis=0)
            facts = {"loss": float(mean[0]), "accuracy": float(mean[1])}
            self.display.epoch(phase.name, epoch, phase.fit.epochs, global_step, facts)


def _residuals(admm: Any, seeds: int, rules: Rules) -> list[dict[str, Any]]:
    if int(admm.updates) == 0:
        return [{} for _ in range(seeds)]
    primal, dual, rho = jax.device_get((admm.primal, admm.dual, admm.rho))
    return [
        {
            "primal": {n: float(np.max(v[i])) for n, v in primal.items()},
            "dual": {n: float(np.max(v[i])) for n, v in dual.items()},
            "rho": {n: float(v[i]) for n, v in rho.items()},
            **by_set({n: v[i] for n, v in primal.items()}, {n: v[i] for n, v in dual.items()}, rules),
        }
        for i in range(seeds)
    ]
