"""Federated learning with sparse, encrypted updates: simulation, baselines, exact bytes, modelled time, a report.

    python -m experiments.federated --config=configs/federated.py:digits --workdir=runs/federated

The aggregation enclave is SIMULATED here; accuracy and bytes do not depend on that, confidentiality does. Real
processes: `experiments.federated_nodes`.
"""

import dataclasses
import io
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from compressx.constraints import unstructured
from compressx.federated import algorithm, secagg, splits, timing
from compressx.federated.algorithm import Algorithm
from compressx.federated.simulate import Ledger, SimState, Simulation, with_sparsity
from compressx.federated.trusted import attest, sessions
from compressx.federated.trusted.rounds import State
from compressx.federated.trusted.sealing import write_durably
from compressx.harden import structures
from compressx.report import console, html, plots, style
from compressx.report.environment import run_record
from compressx.report.metrics import MetricsWriter
from compressx.report.summary import make_summary, read_summary, write_summary
from compressx.training import ConfigError, Diverged, Weights, state
from experiments import artifacts, cnn, driver
from experiments import federated_setup as setup
from experiments.driver import Options
from experiments.federated_setup import Config, Setting, read

NpArray = npt.NDArray[Any]
SIMULATED = (
    "SIMULATED: no SGX hardware was used. The protocol, its bytes and the model are the real ones; confidentiality "
    "against whoever runs the server's machine is not."
)


class Arm(NamedTuple):
    """One algorithm's finished run.

    Attributes:
      alg: the algorithm.
      state: the last model.
      ledger: bytes, losses and residuals of every round.
      scores: round -> {"accuracy", "loss"} after it; -1 before the first.
      pruning: accuracy before and after pruning, where the model is pruned.
      seconds: wall time of the simulation.
    """

    alg: Algorithm
    state: SimState
    ledger: Ledger
    scores: dict[int, dict[str, float]]
    pruning: dict[str, float]
    seconds: float


# -- running an arm ----------------------------------------------------------------------------------------------------


def arms(config: Config) -> dict[str, Algorithm]:
    """What is trained: the algorithm itself and, of the baselines, those that are another training."""
    none = {"sparsify": "none", "density": (), "prune_round": 0, "admm_rounds": 0}
    plain = with_sparsity(config.algorithm, value_type="float32", **none)
    out = {"sparse": config.algorithm}
    if "dense" in config.baselines or "secagg" in config.baselines:
        out["dense"] = plain
    if "fedprox" in config.baselines:
        out["fedprox"] = dataclasses.replace(plain, mu=config.fedprox_mu)
    return out


def run_arm(
    config: Config, name: str, alg: Algorithm, setting: Setting, folder: Path, writer: MetricsWriter, at: int
) -> Arm:
    """Trains one arm, or what is left of it; every `eval_every` rounds it is evaluated and saved."""
    try:
        simulation = Simulation(
            setting.task,
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


# -- bytes and time ----------------------------------------------------------------------------------------------------


def handshake_bytes() -> tuple[int, int]:
    """Bytes up and down of one handshake, with a (SIMULATED) quote."""
    quote = attest.SimulatedAttester(bytes(32), bytes(32)).quote(bytes(64))
    return sessions.HELLO_BYTES, sessions.OFFER_BYTES + len(quote)


def totals(arm: Arm, encrypted: bool, hands: tuple[int, int], ids: Sequence[NpArray]) -> dict[str, int]:
    """All bytes of a run: messages, frames, handshakes of every client that took part."""
    n = arm.ledger.down.size
    down, up = int(arm.ledger.down.sum()), int(arm.ledger.up.sum())
    out = {
        "model_down": down,
        "update_up": up,
        "framing_down": 0,
        "framing_up": 0,
        "handshake_down": 0,
        "handshake_up": 0,
    }
    if encrypted:
        clients = len(np.unique(np.concatenate(list(ids))))
        out |= {"framing_down": n * (sessions.FRAME_BYTES + 4), "framing_up": n * sessions.UPDATE_BYTES}
        out |= {"handshake_down": clients * hands[1], "handshake_up": clients * hands[0]}
    return out | {"total": sum(out.values())}


def seconds_of(
    config: Config, arm: Arm, setting: Setting, encrypted: bool, hands: tuple[int, int], ids: Sequence[NpArray]
) -> NpArray:
    """Modelled seconds by round and stage `[rounds, stages]`, with the costs measured for this arm's messages."""
    alg = arm.alg
    plan = setup.make_plan(config, alg, setting)
    speeds = config.network.speeds(config.seed, len(setting.split))
    layers = tuple(np.asarray(x).reshape(-1) for x in jax.device_get(arm.state.leaves))
    masks = tuple(None if m is None else np.asarray(m).reshape(-1) for m in jax.device_get(arm.state.masks))
    costs: dict[bool, timing.Costs] = {}
    rows: list[list[float]] = []
    met: set[int] = set()
    for r, who in enumerate(ids):
        pruned = plan.pruned(r)
        if pruned not in costs:
            held = masks if pruned else (None,) * len(layers)
            costs[pruned] = timing.measure(plan, State(r, layers, held, bytes(32), {}))
        new = np.array([encrypted and int(c) not in met for c in who])
        met.update(int(c) for c in who)
        extra = (sessions.FRAME_BYTES + 4, sessions.UPDATE_BYTES) if encrypted else (0, 0)
        examples = np.array([algorithm.local_steps(alg, len(setting.split[c])) * alg.batch for c in who])
        stages = timing.elapsed(
            config.network,
            speeds,
            who,
            arm.ledger.down[r] + extra[0] + new * hands[1],
            arm.ledger.up[r] + extra[1] + new * hands[0],
            examples,
            costs[pruned],
            encrypted,
        )
        rows.append([stages[s] for s in timing.STAGES])
    return np.array(rows)


def secagg_audit(config: Config, setting: Setting, leaves: Sequence[Any]) -> dict[str, Any]:
    """One masked round of real messages on these weights, one client dropping out, against the plain mean."""
    clients = min(len(setting.split), 5)
    flat = np.concatenate([np.asarray(x).reshape(-1) for x in leaves])
    rng = np.random.default_rng(config.seed)
    vectors = {k: (flat * np.float32(1 + 0.01 * rng.standard_normal())).astype(np.float32) for k in range(clients)}
    threshold = clients // 2 + 1
    sizes = [len(setting.split[k]) for k in range(clients)]
    weights = {k: sizes[k] / sum(sizes) for k in range(clients)}
    members = {k: secagg.Member(k, threshold) for k in range(clients)}
    advertised = {k: m.advertise() for k, m in members.items()}
    shares = {k: m.share(advertised) for k, m in members.items()}
    stay = list(range(clients - 1)) if clients > 2 else list(range(clients))
    uploads = {
        k: members[k].masked(secagg.to_field(vectors[k], weights[k]), {j: shares[j][k] for j in members if j != k})
        for k in stay
    }
    revealed = {k: members[k].reveal(stay) for k in stay}
    total = secagg.unmask(uploads, advertised, revealed, threshold)
    part = sum(weights[k] for k in stay)
    mean = sum((weights[k] / part) * vectors[k].astype(np.float64) for k in stay)
    error = float(np.max(np.abs(secagg.from_field(total, part) - mean)))
    return {"clients": clients, "dropped": clients - len(stay), "largest_error": error}


def secagg_bytes(dense: Arm, clients: int, size: int) -> int:
    """All bytes of dense FedAvg under masking: the models down in the clear, key shares and masked vectors."""
    number, m = dense.ledger.down.shape
    del clients
    down, up = secagg.round_bytes(m, m, size)
    return int(dense.ledger.down.sum()) + number * (down + up)


# -- the run -----------------------------------------------------------------------------------------------------------


def train_and_evaluate(config: Config, options: Options) -> dict[str, Any]:
    """Runs the experiment, or what is left of it, and writes everything about it into the work directory.

    Returns:
      The summary.

    Raises:
      One of `driver.USER_ERRORS`.
    """
    workdir, written = options.workdir, dataclasses.asdict(config)
    driver.check_claim(workdir, written)
    if (workdir / "summary.json").exists():
        print(f"{workdir} is finished and left as it is; its report is {workdir / 'report.html'}")
        return read_summary(workdir / "summary.json")
    setting = setup.make(config, options)
    todo = arms(config)
    for alg in todo.values():
        algorithm.layout(alg, setting.model)
    driver.claim(workdir, written)
    folder = workdir / "checkpoints"
    resumed = _resumed_step(folder, todo)
    finished = {}
    with MetricsWriter(workdir / "metrics.jsonl", resumed) as writer:
        for k, (name, alg) in enumerate(todo.items()):
            finished[name] = run_arm(config, name, alg, setting, folder, writer, k * alg.rounds)
    return conclude(config, options, setting, finished)


def _resumed_step(folder: Path, todo: dict[str, Algorithm]) -> int | None:
    last = None
    for k, (name, alg) in enumerate(todo.items()):
        path = folder / f"{name}.npz"
        if path.exists():
            with np.load(path) as held:
                last = k * alg.rounds + json.loads(held["done"].tobytes())["round"] - 1
    return last


def conclude(config: Config, options: Options, setting: Setting, finished: dict[str, Arm]) -> dict[str, Any]:
    """Counts, measures, and writes model, plots, report and, last, the summary."""
    workdir, sparse = options.workdir, finished["sparse"]
    alg = sparse.alg
    ids = [algorithm.participants(config.seed, alg, len(setting.split), r) for r in range(alg.rounds)]
    hands = handshake_bytes()
    counts = {"encrypted sparse": totals(sparse, True, hands, ids)}
    times = {"encrypted sparse": seconds_of(config, sparse, setting, True, hands, ids)}
    dense = finished.get("dense")
    size = sum(int(np.size(x)) for x in sparse.state.leaves)
    if dense is not None:
        counts["encrypted dense"] = totals(dense, True, hands, ids)
        counts["plain dense"] = totals(dense, False, hands, ids)
        times["encrypted dense"] = seconds_of(config, dense, setting, True, hands, ids)
        times["plain dense"] = seconds_of(config, dense, setting, False, hands, ids)
    audit = None
    if "secagg" in config.baselines and dense is not None:
        counts["secagg dense"] = {"total": secagg_bytes(dense, len(setting.split), size)}
        audit = secagg_audit(config, setting, dense.state.leaves)
    saving = 1 - counts["encrypted sparse"]["total"] / counts["encrypted dense"]["total"] if dense else None
    speedup = float(times["encrypted dense"].sum() / times["encrypted sparse"].sum()) if dense else None

    treedef = jax.tree.structure(setting.model)
    model = jax.tree.unflatten(treedef, list(sparse.state.leaves))
    weights = Weights({"params": model["params"]}, {k: v for k, v in model.items() if k != "params"}, {})
    rules = None
    if alg.pruning:
        layers = algorithm.layout(alg, model)
        rules = [(re.escape(x.name), unstructured(keep=x.budget)) for x in layers if x.budget < x.size]
        weights = weights._replace(structure=structures(weights.params, rules))
    facts = {
        "driver": "federated",
        "dataset": setting.info.name,
        "classes": setting.info.classes,
        "mean": list(config.data.mean or setting.info.mean),
        "std": list(config.data.std or setting.info.std),
        "seed": config.seed,
    }
    described = {"name": config.model.name, "options": dict(config.model.options)}
    stored = artifacts.save(workdir / artifacts.MODEL, weights, rules, described, facts)

    table = splits.table(setting.split, setting.train["labels"])
    accuracy = {name: arm.scores[arm.alg.rounds - 1]["accuracy"] for name, arm in finished.items()}
    residual = float(sparse.ledger.residual[alg.prune_round - 1]) if alg.pruning and alg.prune_round else None
    block = {
        "enclave": "SIMULATED",
        "heterogeneity": splits.heterogeneity(table),
        "client_sizes": table.sum(1).tolist(),
        "accuracy": accuracy,
        "rounds_to_dense_accuracy": None if dense is None else _first_round(sparse, accuracy["dense"]),
        "pruning": sparse.pruning or None,
        "bytes": counts,
        "bytes_counted": "payload, frame header, tag, hash, hello, offer with quote; not gRPC's and TLS's framing",
        "saving": saving,
        "speedup": speedup,
        "seconds": {
            k: dict(zip(timing.STAGES, v.sum(0).tolist(), strict=True)) | {"total": float(v.sum())}
            for k, v in times.items()
        },
        "network": dataclasses.asdict(config.network),
        "secagg_audit": audit,
        "density": {
            "before_pruning": float(sparse.ledger.density[-1, 0]),
            "after": float(sparse.ledger.density[-1, 1]),
        },
        "paper": dataclasses.asdict(config.paper) if config.paper.what else None,
        "simulation_seconds": {k: v.seconds for k, v in finished.items()},
        "run": run_record(options.command),
    }
    known = config.paper.accuracy > 0
    summary = make_summary(
        driver="federated",
        variant=config.variant,
        seed=config.seed,
        dataset={
            "name": setting.info.name,
            "source": setting.info.source,
            "train": len(setting.train["labels"]),
            "test": len(setting.test["labels"]),
            "stand_in": setting.info.stand_in,
        },
        metric={
            "name": "accuracy",
            "higher_is_better": True,
            "dense": accuracy.get("dense"),
            "dense_same_budget": None,
            "one_shot": None,
            "hardened": sparse.pruning.get("after"),
            "compressed": accuracy["sparse"],
        },
        rate=stored.rate,
        bytes=stored.size,
        residual={"primal": residual, "dual": None},
        violations=stored.violations,
        latency_ms=None,
        seconds=sum(a.seconds for a in finished.values()),
        paper={"quantity": "metric.compressed", "value": config.paper.accuracy} if known else None,
        federated=block,
    )
    page = html.Page(
        summary=summary,
        config=json.loads((workdir / "config.json").read_text()),
        layers=stored.layers,
        pictures=pictures(workdir, table, finished, times),
        sections=sections(config, summary),
        links=artifacts.links(workdir),
    )
    html.write_report(workdir / "report.html", page)
    write_summary(workdir / "summary.json", summary)
    console.print_report(summary, stored.layers)
    print(SIMULATED)
    return summary


def _first_round(arm: Arm, accuracy: float) -> int | None:
    reached = [r + 1 for r, s in sorted(arm.scores.items()) if s["accuracy"] >= accuracy]
    return reached[0] if reached else None


# -- the page ----------------------------------------------------------------------------------------------------------


def draw_split(path: Path, table: NpArray) -> Path:
    """The client x label picture: examples of every label at every client."""
    with style.figure(path, min(9.0, 1.4 + 0.16 * len(table))) as fig:
        ax = fig.add_subplot()
        image = ax.imshow(table, aspect="auto", cmap="Blues", interpolation="nearest")
        fig.colorbar(image, ax=ax, label="examples")
        ax.set_xticks(range(table.shape[1]))
        ax.set_xlabel("label")
        ax.set_ylabel("client")
        ax.grid(visible=False)
        ax.set_title(f"Who holds what; heterogeneity {splits.heterogeneity(table):.3f}")
        if table.size <= 200:
            for k, row in enumerate(table):
                for label, n in enumerate(row):
                    colour = "white" if n > 0.6 * table.max() else "black"
                    ax.text(label, k, str(n), ha="center", va="center", fontsize=6.5, color=colour)
    return path


def pictures(workdir: Path, table: NpArray, finished: dict[str, Arm], times: dict[str, NpArray]) -> list[html.Picture]:
    """Split, accuracy, bytes and time, as PNGs in the work directory."""
    out = [html.Picture(draw_split(workdir / "split.png", table), "Split", "Examples of each label at each client.")]
    curves = {}
    against = {}
    for name, arm in finished.items():
        at = sorted(arm.scores)
        values = np.array([arm.scores[r]["accuracy"] for r in at])
        curves[name] = (np.array(at) + 1, values)
        spent = np.cumsum(arm.ledger.down.sum(1) + arm.ledger.up.sum(1))
        against[name] = (spent[at] / 1e6, values)
    path = plots.lines(
        workdir / "accuracy.png", curves, title="Accuracy by round", ylabel="accuracy", xlabel="round", percent=True
    )
    out.append(html.Picture(path, "Accuracy by round", "On the whole test set."))
    path = plots.lines(
        workdir / "accuracy_bytes.png",
        against,
        title="Accuracy by bytes moved",
        ylabel="accuracy",
        xlabel="megabytes, up and down, all clients",
        percent=True,
        logx=True,
    )
    out.append(html.Picture(path, "Accuracy by bytes", "Messages of all clients, cumulative."))
    used = {}
    for name, arm in finished.items():
        number = np.arange(1, arm.alg.rounds + 1)
        used[f"{name}, down"] = (number, arm.ledger.down.sum(1) / 1e6)
        used[f"{name}, up"] = (number, arm.ledger.up.sum(1) / 1e6)
    path = plots.lines(
        workdir / "bytes.png", used, title="Bytes by round", ylabel="megabytes", xlabel="round", logy=True
    )
    out.append(html.Picture(path, "Bytes by round", "Exact sizes of the messages of all clients."))
    elapsed = {name: (np.arange(1, len(t) + 1), np.cumsum(t.sum(1))) for name, t in times.items()}
    path = plots.lines(
        workdir / "elapsed.png", elapsed, title="Modelled elapsed time", ylabel="seconds", xlabel="round"
    )
    text = "Bytes are exact and packing, sealing and aggregation are measured; links and device speeds are assumed."
    out.append(html.Picture(path, "Elapsed time", text))
    return out


def sections(config: Config, summary: dict[str, Any]) -> list[tuple[str, html.Content]]:
    """What only this driver knows."""
    block = summary["federated"]
    counts = block["bytes"]
    rows = [[name, *(f"{c.get(k, 0):,}" if k in c else "-" for k in _BYTE_KEYS)] for name, c in counts.items()]
    bytes_table = html.Table(("run", *_BYTE_KEYS), rows, (False, *[True] * len(_BYTE_KEYS)))
    stages = [[n, *(f"{v[k]:.2f}" for k in (*timing.STAGES, "total"))] for n, v in block["seconds"].items()]
    time_table = html.Table(("run", *timing.STAGES, "total"), stages, (False, *[True] * (len(timing.STAGES) + 1)))
    n = config.network
    link = (
        f"Assumed: {n.up_mbit:g} Mbit/s up, {n.down_mbit:g} down, {n.latency_ms:g} ms one way, "
        f"{n.examples_per_second:g} examples a second (median, spread {n.spread:g}), devices {n.slower:g} times slower "
        "than this machine. Seconds are those of the "
        "slowest client of every round, and the server's."
    )
    if block["speedup"]:
        link += f" Elapsed-time gain over encrypted dense: {block['speedup']:.2f}x."
    compared: list[list[str]] = []
    if block["paper"]:
        ours = {"accuracy": summary["metric"]["compressed"], "saving": block["saving"], "speedup": block["speedup"]}
        for key in ours:
            theirs, mine = block["paper"][key], ours[key]
            compared.append([key, f"{theirs:.4g}" if theirs else "-", "-" if mine is None else f"{mine:.4g}"])
    out: list[tuple[str, html.Content]] = [("Enclave", SIMULATED)]
    out.append(("Bytes", [f"Counted: {block['bytes_counted']}.", bytes_table]))
    out.append(("Elapsed time", [link, time_table]))
    if compared:
        note = (
            f"The paper's values are those of its abstract ({block['paper']['what']}); its recipe, its baseline of the "
            "saving and of "
            "the speed-up, its SGX set-up and its link are not published, so only the accuracies are of the same kind."
        )
        if summary["dataset"]["stand_in"]:
            note += " The data here are a stand-in: compare only the difference between dense and sparse."
        out.append(
            ("Beside the paper", [note, html.Table(("quantity", "paper", "here"), compared, (False, True, True))])
        )
    accuracy = [[name, f"{100 * value:.2f} %"] for name, value in block["accuracy"].items()]
    out.append(("Accuracy", html.Table(("run", "after the last round"), accuracy, (False, True))))
    return out


_BYTE_KEYS = ("model_down", "update_up", "framing_down", "framing_up", "handshake_down", "handshake_up", "total")


def evaluate(config: Config, options: Options) -> dict[str, Any]:
    """Evaluates a finished run's model on a split, as `experiments.cnn` does."""
    return cnn.evaluate(config, options)  # type: ignore[arg-type]


if __name__ == "__main__":
    driver.main("experiments.federated", train_and_evaluate, evaluate, read)
