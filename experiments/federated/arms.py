"""Training of a federated experiment's arms: the algorithm itself and its baselines, evaluated, saved, resumed."""

import dataclasses
import io
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compressx.federated.algorithm import Algorithm
from compressx.federated.simulate import Ledger, SimState, Simulation, with_sparsity
from compressx.federated.trusted.sealing import write_durably
from experiments.common.report.metrics import MetricsWriter
from experiments.common.training import ConfigError, Diverged, state
from experiments.federated.config import Config, Setting


class Arm(NamedTuple):
    """One algorithm's finished run.

    Attributes:
      alg: the algorithm.
      state: the last model.
      ledger: bytes, losses and residuals of every round.
      scores: round -> {"accuracy", "loss"} after it.
      pruning: accuracy before and after pruning, where the model is pruned.
      seconds: wall time of the simulation.
    """

    alg: Algorithm
    state: SimState
    ledger: Ledger
    scores: dict[int, dict[str, float]]
    pruning: dict[str, float]
    seconds: float


def dense(alg: Algorithm, value_type: str = "float32") -> Algorithm:
    """The same algorithm without sparsity: plain FedAvg."""
    return with_sparsity(
        alg, value_type=value_type, sparsify="none", density=(), prune_round=0, admm_rounds=0
    )


def arms(config: Config) -> dict[str, Algorithm]:
    """What is trained: the algorithm itself and, of the baselines, those that are another training."""
    out = {"sparse": config.algorithm}
    if "dense" in config.baselines or "secagg" in config.baselines:
        out["dense"] = dense(config.algorithm)
    if "fedprox" in config.baselines:
        out["fedprox"] = dataclasses.replace(dense(config.algorithm), mu=config.fedprox_mu)
    return out


def run_arm(
    config: Config, name: str, alg: Algorithm, setting: Setting, folder: Path, writer: MetricsWriter, at: int
) -> Arm:
    """Trains one arm, or what is left of it; every `eval_every` rounds it is evaluated and saved."""
    try:
        simulation = Simulation(
            setting.loss,
            alg,
            setting.model,
            setting.train,
            setting.split,
            config.seed,
            width=config.width,
            padded=config.padded,
            oblivious=config.oblivious,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    score = state.make_evaluate(setting.task, config.eval_batch)
    test = jax.tree.map(jnp.asarray, setting.test)

    def evaluate(s: SimState) -> dict[str, float]:
        model = simulation.model(s)
        return score({"params": model["params"]}, {k: v for k, v in model.items() if k != "params"}, test)

    path = folder / f"{name}.npz"
    now: SimState = simulation.start()
    ledger: Ledger | None = None
    done: dict[str, Any] = {"round": 0, "scores": {}, "pruning": {}, "seconds": 0.0}
    if path.exists():
        now, ledger, done = load(path, simulation)
    while (first := int(done["round"])) < alg.rounds:
        begin = time.perf_counter()
        if alg.pruning and first == alg.prune_round:
            done["pruning"]["before"] = evaluate(now)["accuracy"]
            now = simulation.prune(now)
            done["pruning"]["after"] = evaluate(now)["accuracy"]
        stop = min(alg.rounds, first + config.eval_every - first % config.eval_every)
        if alg.pruning and first < alg.prune_round:
            stop = min(stop, alg.prune_round)
        now, part = simulation.run(now, first, stop - first)
        ledger = part if ledger is None else Ledger(*(np.concatenate(x) for x in zip(ledger, part, strict=True)))
        figures = evaluate(now)
        if not np.isfinite(part.loss).all():
            raise Diverged(
                f"{name}: the loss is not finite after round {stop}; lower algorithm.lr or algorithm.rho_final"
            )
        done["scores"][str(stop - 1)] = figures
        done["round"], done["seconds"] = stop, done["seconds"] + time.perf_counter() - begin
        for i, r in enumerate(range(first, stop)):
            last = {"accuracy": figures["accuracy"], "test_loss": figures["loss"]} if r == stop - 1 else {}
            writer.write(
                at + r,
                name,
                round=r,
                kind=alg.kind(r),
                loss=float(part.loss[i]),
                residual=float(part.residual[i]),
                down_bytes=int(part.down[i].sum()),
                up_bytes=int(part.up[i].sum()),
                density=part.density[i].tolist(),
                **last,
            )
        writer.sync()
        save(path, now, ledger, done)
        print(
            f"{name}: round {stop} of {alg.rounds}, {alg.kind(stop - 1)}, loss {part.loss[-1]:.4f}, "
            f"accuracy {figures['accuracy']:.4f}",
            flush=True,
        )
    assert ledger is not None
    scores = {int(k): v for k, v in done["scores"].items()}
    return Arm(alg, now, ledger, scores, done["pruning"], float(done["seconds"]))


def save(path: Path, now: SimState, ledger: Ledger, done: dict[str, Any]) -> None:
    """Writes an arm's state in one step."""
    out = io.BytesIO()
    arrays = {f"leaf{k}": np.asarray(x) for k, x in enumerate(now.leaves)}
    arrays |= {f"mask{k}": np.asarray(m) for k, m in enumerate(now.masks) if m is not None}
    arrays |= {f"memory{k}": np.asarray(m) for k, m in enumerate(now.memory)}
    arrays |= {f"ledger_{k}": v for k, v in ledger._asdict().items()} | {"knows": now.knows_masks}
    arrays["done"] = np.frombuffer(json.dumps(done).encode(), np.uint8)
    np.savez(out, allow_pickle=False, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, out.getvalue())


def load(path: Path, simulation: Simulation) -> tuple[SimState, Ledger, dict[str, Any]]:
    """Inverse of `save`."""
    start = simulation.start()
    with np.load(path) as held:
        masks = tuple(jnp.asarray(held[f"mask{k}"]) if f"mask{k}" in held else None for k in range(len(start.leaves)))
        now = SimState(
            tuple(jnp.asarray(held[f"leaf{k}"]) for k in range(len(start.leaves))),
            masks,
            tuple(jnp.asarray(held[f"memory{k}"]) for k in range(len(start.memory))),
            held["knows"],
        )
        ledger = Ledger(*(held[f"ledger_{k}"] for k in Ledger._fields))
        return now, ledger, json.loads(held["done"].tobytes())


def resumed_step(folder: Path, todo: dict[str, Algorithm]) -> int | None:
    """The last step that the checkpoints hold, of all arms; None without any."""
    last = None
    for k, (name, alg) in enumerate(todo.items()):
        path = folder / f"{name}.npz"
        if path.exists():
            with np.load(path) as held:
                last = k * alg.rounds + json.loads(held["done"].tobytes())["round"] - 1
    return last
