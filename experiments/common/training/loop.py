"""The loop over phases, epochs and steps: it trains, records, saves and resumes; all mathematics is elsewhere."""

import os
import time
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compressx._admm_state import by_set
from compressx._admm_state import find_state as find_admm
from compressx._harden import structures
from compressx._retrain import find_state as find_retrain
from compressx.rules import Rules
from compressx.tree import check_finite
from experiments.common.data import batches
from experiments.common.report.metrics import MetricsWriter
from experiments.common.training import gradual, mesh, optimizers
from experiments.common.training.checkpoint import CheckpointError, Checkpoints
from experiments.common.training.config import Admm
from experiments.common.training.job import Job, check_phases, epoch_order, like, phase_key, size
from experiments.common.training.libraries import rounds
from experiments.common.training.mesh import agree
from experiments.common.training.phases import DENSE, Phase, Weights, harden, settle
from experiments.common.training.progress import Display, StopOnce
from experiments.common.training.refreshes import changes
from experiments.common.training.state import (
    Sums,
    TrainState,
    all_finite,
    averages,
    make_evaluate,
    make_runner,
    make_step,
)


class Diverged(RuntimeError):
    """Training produced NaN or infinity; the message names the phase, the epoch and the leaf."""


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C after a checkpoint was written; the message says where it is."""


class Outcome(NamedTuple):
    """What `train` leaves.

    Attributes:
      results: phase name -> {"start": figures, "end": figures, "primal": .., "dual": ..}.
      seconds: time spent training, over all sessions.
      checkpoints: where the phases' weights lie.
      resumed: the step at which this session went on, or None.
    """

    results: dict[str, Any]
    seconds: float
    checkpoints: Checkpoints
    resumed: int | None

    def weights(self, job: Job, phase: Phase) -> Weights:
        """What a phase left, on the host; every process calls it."""
        return mesh.host(self.checkpoints.load_weights(phase.name, like(job.first, phase, job.placement)))


class _Begun(NamedTuple):
    """A phase ready to train."""

    state: TrainState
    tx: optax.GradientTransformationExtraArgs
    structure: dict[str, Any]


def train(job: Job, phases: tuple[Phase, ...], workdir: Path, display: Display) -> Outcome:
    """Runs all phases, from the newest checkpoint if there is one; ends with the same bits whether interrupted or not.

    Raises:
      Diverged, CheckpointError, ConfigError, ConstraintViolation: each says what and where.
    """
    job.placement.check_batch(job.batch)
    check_phases(job, phases)
    return _Run(job, phases, workdir, display).go()


class _Run:
    """One call of `train`: what does not change during it, and the small steps it is made of."""

    def __init__(self, job: Job, phases: tuple[Phase, ...], workdir: Path, display: Display) -> None:
        self.job, self.phases, self.display = job, phases, display
        self.place = job.placement
        self.first = job.first
        self.checkpoints = Checkpoints(workdir / "checkpoints", display.say)
        self.metrics_path = workdir / "metrics.jsonl"
        self.metrics: MetricsWriter | None = None
        self.train_data = self.place.copy(dict(job.train))
        self.sets = {"": self.place.copy(dict(job.test))}
        if job.validation is not None:
            self.sets["validation_"] = self.place.copy(dict(job.validation))
        self.evaluate = make_evaluate(job.task, job.eval_batch, self.place.batch)
        self.per_epoch = batches.steps_per_epoch(size(job.train), job.batch)
        self.results: dict[str, Any] = {}
        self._signals = StopOnce(display.say, heeds=jax.process_count() == 1)  # several would have to agree
        self.spent, self.started, self.saved_at = 0.0, time.monotonic(), time.monotonic()

    # -- the phases ---------------------------------------------------------------------------------------------------

    def go(self) -> Outcome:
        index, begun, resumed = self._resume()
        done_before = index == len(self.phases)
        if begun is not None:
            at = f"{self.phases[index].name}, epoch {int(begun.state.step) / self.per_epoch:.3g}"
            self.display.say(f"resuming at {at}: step {resumed} of {self._offset(len(self.phases))}")
        with self._signals, self.checkpoints:
            while index < len(self.phases):
                phase = self.phases[index]
                if begun is None:
                    begun = self._begin(phase)
                    self._write_start(phase, index, begun)
                self._train(phase, index, begun)
                index, begun = index + 1, None
            if not done_before:
                self._save_done()
        if self.metrics is not None:
            self.metrics.close()
        return Outcome(self.results, self._seconds(), self.checkpoints, resumed)

    def _begin(self, phase: Phase) -> _Begun:
        """The phase's optimizer and first state, from the weights it starts with."""
        weights = self._load(phase.start) if phase.start else self.first
        rules, structure = phase.rules, weights.structure
        if phase.kind == "retrain":
            assert rules is not None
            weights = harden(weights, rules)
            structure = weights.structure
        elif phase.kind == "gradual":
            assert rules is not None
            structure = jax.jit(lambda p: structures(p, rules))(weights.params)
        steps = phase.fit.epochs * self.per_epoch
        tx = optimizers.of_phase(self.job.optimizer, phase, steps, self.per_epoch, structure or None, self.job.clip)
        params = self.place.put(weights.params)
        state = TrainState(
            params=params,
            batch_stats=self.place.put(weights.batch_stats),
            opt_state=jax.jit(tx.init)(params),
            step=jnp.zeros((), jnp.int32),
            key=phase_key(phase, self.job.seed),
            sums=Sums.zero(),
        )
        return _Begun(self.place.put(state), tx, structure)

    def _write_start(self, phase: Phase, index: int, begun: _Begun) -> None:
        """Records what the phase starts from (for retraining: the hardened weights), and saves it."""
        figures = self._figures(begun.state)
        self.results[phase.name] = {"start": figures}
        self._note_best(phase, 0, begun.state, figures)
        self._record(self._offset(index), phase.name, epoch=0, **figures)
        self._save(phase, index, begun.state, 0)

    def _train(self, phase: Phase, index: int, begun: _Begun) -> None:
        state, fit = begun.state, phase.fit
        teacher = None
        if fit.distill:
            dense = self._load(DENSE)
            teacher = (self.place.put(dense.params), self.place.put(dense.batch_stats))
        step = make_step(self.job.task, begun.tx, fit, self.place.batch)
        runner = make_runner(lambda *args: self.place.keep(step(*args)))
        steps, offset, done = fit.epochs * self.per_epoch, self._offset(index), int(state.step)
        due = optimizers.every(fit, self.per_epoch) if isinstance(fit, Admm) else 0
        self.display.move(phase.name, offset + done)
        current, order = -1, self.place.copy(np.zeros((0, 0), np.int32))
        while done < steps:
            epoch = done // self.per_epoch
            if epoch != current:
                current, order = epoch, self.place.copy(epoch_order(phase, epoch, self.job))
            stop = min(self._next(done, self.job.chunk), (epoch + 1) * self.per_epoch)
            if phase.kind == "gradual":
                stop = min(stop, self._next(done, due))
            if self.job.save_steps:
                stop = min(stop, self._next(done, self.job.save_steps))
            state = runner(state, self.train_data, order, teacher, stop - done)
            done = stop
            if phase.kind == "gradual" and done % due == 0:
                state = self._prune(phase, state, (done // due) / max(steps // due, 1))
            jax.block_until_ready(state.step)
            self.display.move(phase.name, offset + done)
            if done % self.per_epoch == 0:
                state = self._end_epoch(phase, state, offset + done)
            stop_here = done < steps and self._signals.asked
            if stop_here or (done < steps and self._save_is_due(done)):
                self._save(phase, index, state, done)
            if stop_here:
                raise Interrupted(f"stopped in {phase.name}, epoch {done / self.per_epoch:.3g}, and saved")
        self._end(phase, begun, state)

    def _prune(self, phase: Phase, state: TrainState, t: float) -> TrainState:
        """One step of gradual pruning: the smallest weights go, and stay gone."""
        assert phase.rules is not None
        params, active = gradual.prune(state.params, phase.rules, t)
        opt_state = gradual.with_active(state.opt_state, active)
        return self.place.put(state._replace(params=params, opt_state=opt_state))

    def _end_epoch(self, phase: Phase, state: TrainState, global_step: int) -> TrainState:
        epoch = int(state.step) // self.per_epoch
        mean = averages(state.sums)
        if not (np.isfinite(mean["loss"]) and bool(all_finite((state.params, state.batch_stats)))):
            _diverged(phase, epoch, state, mean["loss"])
        figures = self._figures(state)
        residuals = _residuals(state.opt_state, phase.rules or ()) if phase.kind == "admm" else {}
        values = {"loss": mean["loss"], "train_accuracy": mean["accuracy"], **figures, **residuals}
        if phase.kind == "admm" and jax.process_count() == 1:
            assert phase.rules is not None
            values |= rounds(state.params, phase.rules, find_admm(state.opt_state))
        self._record(global_step, phase.name, epoch=epoch, **values)
        self.results[phase.name]["end"] = {"loss": mean["loss"], "train_accuracy": mean["accuracy"], **figures}
        self.results[phase.name].update({k: v for k, v in residuals.items() if k in ("primal", "dual")})
        self._note_best(phase, epoch, state, figures)
        shown = {"loss": mean["loss"], "accuracy": figures["accuracy"]}
        if residuals.get("primal"):
            shown["residual"] = max(residuals["primal"].values())
        self.display.epoch(phase.name, epoch, phase.fit.epochs, global_step, shown)
        return state._replace(sums=self.place.put(Sums.zero()))

    def _end(self, phase: Phase, begun: _Begun, state: TrainState) -> None:
        """Keeps what the phase leaves: for retraining, exactly inside its sets."""
        params, structure, stats = state.params, begun.structure, state.batch_stats
        self.results[phase.name].setdefault("end", self.results[phase.name]["start"])
        best = self.results[phase.name].get("best")
        if best is not None and best["epoch"] < phase.fit.epochs:
            template = like(self.first, phase._replace(rules=None), self.place)
            params, stats, _ = self.checkpoints.load_weights(f"{phase.name}.best", template)
            self.results[phase.name]["end"] |= best
        if phase.kind == "admm":
            assert phase.rules is not None
            structure = structures(params, phase.rules, find_admm(state.opt_state))
        if phase.kind == "retrain":
            assert phase.rules is not None
            settled = settle(Weights(params, {}, structure), phase.rules, find_retrain(state.opt_state))
            params, structure = settled.params, settled.structure
        self.checkpoints.save_weights(phase.name, Weights(params, stats, structure))

    def _note_best(self, phase: Phase, epoch: int, state: TrainState, figures: dict[str, float]) -> None:
        """Keeps the weights of the best epoch so far, where the job selects by one.

        Written before the checkpoint that knows of it: a run that resumes from an earlier one writes the same again.
        """
        if not self.job.select or phase.kind not in ("dense", "retrain"):
            return
        best = self.results[phase.name].get("best")
        if best is None or figures[self.job.select] > best[self.job.select]:
            self.results[phase.name]["best"] = {"epoch": epoch, **figures}
            self.checkpoints.save_weights(f"{phase.name}.best", Weights(state.params, state.batch_stats, {}))

    # -- what is measured ---------------------------------------------------------------------------------------------

    def _figures(self, state: TrainState) -> dict[str, float]:
        out: dict[str, float] = {}
        for prefix, data in self.sets.items():
            mean = self.evaluate(state.params, state.batch_stats, data)
            out |= {f"{prefix}accuracy": mean["accuracy"], f"{prefix or 'test_'}loss": mean["loss"]}
        return out

    def _record(self, step: int, phase: str, **values: Any) -> None:
        if jax.process_index() == 0:
            if self.metrics is None:
                self.metrics = MetricsWriter(self.metrics_path)
            self.metrics.write(step, phase, **values)

    # -- saving and resuming ------------------------------------------------------------------------------------------

    def _save_is_due(self, done: int) -> bool:
        if self.job.save_steps and done % self.job.save_steps == 0:
            return True
        return bool(self.job.save_seconds) and agree(time.monotonic() - self.saved_at >= self.job.save_seconds)

    def _meta(self, phase: str, step: int, global_step: int) -> dict[str, Any]:
        size = 0
        if self.metrics is not None:
            self.metrics.sync()
            size = self.metrics_path.stat().st_size
        return {
            "phase": phase,
            "epoch": step // self.per_epoch,
            "step": step,
            "global_step": global_step,
            "metrics_bytes": size,
            "results": self.results,
            "seconds": self._seconds(),
        }

    def _save(self, phase: Phase, index: int, state: TrainState, step: int) -> None:
        global_step = self._offset(index) + step
        # a phase of no steps starts at the same global step as the next one: the index keeps the numbers apart
        self.checkpoints.save(global_step + index, state, self._meta(phase.name, step, global_step))
        self.saved_at = time.monotonic()

    def _save_done(self) -> None:
        end = self._offset(len(self.phases))
        self.checkpoints.save(end + len(self.phases), {"done": np.ones(1, np.int32)}, self._meta("", 0, end))

    def _resume(self) -> tuple[int, _Begun | None, int | None]:
        """Where to go on: the phase, its state (None at its very start), and the global step (None for a new run)."""
        found, faults = self.checkpoints.read_meta()
        damaged = {}
        for number, meta in found:
            try:
                index, begun = self._reopen(number, meta)
            except CheckpointError as error:
                faults.append(str(error))
                damaged[number] = error
                continue
            for line in faults:
                self.display.say(f"{line}; going back to the one before it")
            self.checkpoints.drop_newer(number)
            self.results, self.spent = meta["results"], float(meta["seconds"])
            if jax.process_index() == 0:
                os.truncate(self.metrics_path, meta["metrics_bytes"])
                self.metrics = MetricsWriter(self.metrics_path, meta["global_step"])
            return index, begun, int(meta["global_step"])
        if faults:
            listing = "\n  ".join(faults)
            raise CheckpointError(
                f"no checkpoint can be read:\n  {listing}\nremove {self.checkpoints.folder} to start anew"
            )
        return 0, None, None

    def _reopen(self, number: int, meta: dict[str, Any]) -> tuple[int, _Begun | None]:
        if meta["phase"] == "":
            return len(self.phases), None
        names = [p.name for p in self.phases]
        if meta["phase"] not in names:
            raise CheckpointError(f"checkpoint {number} is in phase {meta['phase']!r}; this run has {', '.join(names)}")
        index = names.index(meta["phase"])
        begun = self._begin(self.phases[index])
        state = self.place.put(self.checkpoints.restore(number, meta, begun.state))
        return index, begun._replace(state=state)

    def _load(self, name: str) -> Weights:
        phase = next(p for p in self.phases if p.name == name)
        return self.checkpoints.load_weights(name, like(self.first, phase, self.place))

    # -- small things -------------------------------------------------------------------------------------------------

    def _offset(self, index: int) -> int:
        return sum(p.fit.epochs for p in self.phases[:index]) * self.per_epoch

    def _seconds(self) -> float:
        return self.spent + time.monotonic() - self.started

    @staticmethod
    def _next(done: int, step: int) -> int:
        return (done // step + 1) * step


def _diverged(phase: Phase, epoch: int, state: TrainState, loss: float) -> NoReturn:
    """Raises Diverged with what is known."""
    text = f"the loss is {loss} though all weights are finite; lower the learning rate or rho"
    try:
        check_finite(state.params)
        check_finite(state.batch_stats, "running statistic")
    except ValueError as error:
        text = str(error)
    raise Diverged(f"phase {phase.name}, epoch {epoch}: {text}")


def _residuals(opt_state: Any, rules: Rules) -> dict[str, Any]:
    """rho and the residuals by leaf (the largest over its sets) and by set, once there has been an update.

    With them what the last refresh changed, of leaves whose set can tell (`watch_refreshes`).
    """
    state = jax.device_get(find_admm(opt_state)._replace(z=(), center=(), structure={}))
    if int(state.updates) == 0:
        return {}
    found = {
        "primal": {n: float(np.max(v)) for n, v in state.primal.items()},
        "dual": {n: float(np.max(v)) for n, v in state.dual.items()},
        "rho": {n: float(v) for n, v in state.rho.items()},
        **by_set(state.primal, state.dual, rules),
    }
    changed = {n: float(v) for n, v in changes(opt_state).items()}
    return found | ({"changed": changed} if changed else {})
