"""Pictures and sections of a federated run's report."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compressx.federated import splits, timing
from experiments.common.report import format as fmt
from experiments.common.report import html, plots, style
from experiments.common.report.metrics import Phase
from experiments.federated.arms import Arm
from experiments.federated.config import Config

NpArray = npt.NDArray[Any]
SIMULATED = (
    "SIMULATED: no SGX hardware was used. The protocol, its bytes and the model are the real ones; confidentiality "
    "against whoever runs the server's machine is not."
)


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


def stages(arm: Arm) -> list[Phase]:
    """The kinds of rounds, as phases over rounds counted from 1."""
    kinds = [arm.alg.kind(r) for r in range(arm.alg.rounds)]
    first = [r for r in range(len(kinds)) if r == 0 or kinds[r] != kinds[r - 1]]
    return [Phase(kinds[r], r + 1, end) for r, end in zip(first, [*first[1:], len(kinds)], strict=True)]


def pictures(workdir: Path, table: NpArray, finished: dict[str, Arm], times: dict[str, NpArray]) -> list[html.Picture]:
    """Split, accuracy, bytes and time, as PNGs in the work directory."""
    out = [html.Picture(draw_split(workdir / "split.png", table), "Split", "Examples of each label at each client.")]
    curves, against = {}, {}
    for name, arm in finished.items():
        at = sorted(arm.scores)
        values = np.array([arm.scores[r]["accuracy"] for r in at])
        curves[name] = (np.array(at) + 1, values)
        spent = np.cumsum(arm.ledger.down.sum(1) + arm.ledger.up.sum(1))
        against[name] = (spent[at] / 1e6, values)
    path = plots.lines(
        workdir / "accuracy.png",
        curves,
        title="Accuracy by round",
        ylabel="accuracy",
        xlabel="round",
        percent=True,
        phases=stages(finished["sparse"]) if finished["sparse"].alg.pruning else (),
    )
    text = "On the whole test set; shaded: the kinds of rounds of the sparse run."
    out.append(html.Picture(path, "Accuracy by round", text))
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
    used: dict[str, plots.Curve] = {}
    for name, arm in finished.items():
        number = np.arange(1, arm.alg.rounds + 1)
        moved = {"down": arm.ledger.down.sum(1) / 1e6, "up": arm.ledger.up.sum(1) / 1e6}
        if np.array_equal(moved["down"], moved["up"]):
            moved = {"each way": moved["down"]}
        if name != "fedprox":  # as dense
            used |= {f"{name}, {way}": (number, values) for way, values in moved.items()}
    path = plots.lines(
        workdir / "bytes.png", used, title="Bytes by round", ylabel="megabytes", xlabel="round", logy=True
    )
    out.append(html.Picture(path, "Bytes by round", "Exact sizes of the messages of all clients."))
    shown = {name: t for name, t in times.items() if name != "plain dense"}  # it lies on encrypted dense
    elapsed = {name: (np.arange(1, len(t) + 1), np.cumsum(t.sum(1))) for name, t in shown.items()}
    path = plots.lines(
        workdir / "elapsed.png", elapsed, title="Modelled elapsed time", ylabel="seconds", xlabel="round"
    )
    text = "Bytes are exact and packing, sealing and aggregation are measured; links and device speeds are assumed."
    out.append(html.Picture(path, "Elapsed time", text))
    return out


def first(summary: dict[str, Any]) -> list[tuple[str, html.Content]]:
    """What one looks at first: the federation, what was saved, and the arms' accuracies."""
    block = summary["federated"]
    sizes = block["client_sizes"]
    rows = [
        ["clients", f"{len(sizes)}, with {min(sizes)} to {max(sizes)} examples"],
        ["label heterogeneity", f"{block['heterogeneity']:.3f} (0: clients alike; 1 - 1/classes: one label each)"],
        ["bytes saved, up and down, everything counted", f"{fmt.percent(block['saving'])} of encrypted dense FedAvg's"],
        ["saved by sparsity alone", f"{fmt.percent(block['saving_same_values'])} of dense with the same value type"],
        ["elapsed-time gain, modelled", f"{block['speedup']:.2f}× over encrypted dense FedAvg"],
    ]
    rows += [[f"accuracy after the last round, {name}", fmt.percent(v)] for name, v in block["accuracy"].items()]
    if block["pruning"]:
        before, after = block["pruning"]["before"], block["pruning"]["after"]
        rows.append(["accuracy before and after pruning", f"{fmt.percent(before)} to {fmt.percent(after)}"])
    return [("Federation", html.Table(("what", "value"), rows))]


def sections(config: Config, summary: dict[str, Any]) -> list[tuple[str, html.Content]]:
    """Bytes, elapsed time and the paper's values in full."""
    block = summary["federated"]
    out: list[tuple[str, html.Content]] = [("Bytes", _bytes(block)), ("Elapsed time", _time(config, block))]
    if block["paper"]:
        out.append(("Beside the paper", _paper(summary)))
    return out


_WHAT: dict[str, tuple[str, ...]] = {
    "models": ("model_down",),
    "updates": ("update_up",),
    "frames": ("framing_down", "framing_up"),
    "handshakes": ("handshake_down", "handshake_up"),
}


def _bytes(block: dict[str, Any]) -> html.Content:
    base = block["bytes"]["encrypted dense"]["total"]
    rows = []
    for name, c in block["bytes"].items():
        parts = [f"{sum(c[k] for k in keys) / 1e6:,.3f}" if keys[0] in c else "–" for keys in _WHAT.values()]
        rows.append([name, *parts, f"{c['total'] / 1e6:,.3f}", fmt.percent(1 - c["total"] / base)])
    header = ("megabytes", *_WHAT, "total", "saved")
    text = f"Counted: {block['bytes_counted']}. To the byte in summary.json. Saved: of encrypted dense, float32."
    return [text, html.Table(header, rows, (False, *[True] * (len(header) - 1)))]


def _time(config: Config, block: dict[str, Any]) -> html.Content:
    n = config.network
    rows = [[name, *(f"{v[k]:.2f}" for k in (*timing.STAGES, "total"))] for name, v in block["seconds"].items()]
    header = ("seconds", *timing.STAGES, "total")
    text = (
        f"Assumed: {n.up_mbit:g} Mbit/s up, {n.down_mbit:g} down, {n.latency_ms:g} ms one way, "
        f"{n.examples_per_second:g} examples a second (median, spread {n.spread:g}), devices {n.slower:g} times slower "
        "than this machine at packing and sealing. Seconds are those of the slowest client of every round, and the "
        f"server's. Elapsed-time gain over encrypted dense: {block['speedup']:.2f}×; over other links:"
    )
    links = [[name, f"{gain:.2f}×"] for name, gain in block["links"].items()]
    return [
        html.Table(header, rows, (False, *[True] * (len(header) - 1))),
        text,
        html.Table(("Mbit/s up/down", "gain"), links, (False, True)),
    ]


def _paper(summary: dict[str, Any]) -> html.Content:
    block = summary["federated"]
    ours = {"accuracy": summary["metric"]["compressed"], "saving": block["saving"], "speedup": block["speedup"]}
    write = {"accuracy": fmt.percent, "saving": fmt.percent, "speedup": fmt.rate}
    theirs = block["paper"]
    rows = [[key, write[key](theirs[key]) if theirs[key] else "–", write[key](ours[key])] for key in ours]
    note = (
        f"The paper's values are those of its abstract ({theirs['what']}); its recipe, its baseline of the saving and "
        "of the speed-up, its SGX set-up and its link are not published, so only the accuracies are of the same kind."
    )
    if summary["dataset"]["stand_in"]:
        note += " The data here are a stand-in: compare only the difference between dense and sparse."
    return [note, html.Table(("quantity", "paper", "here"), rows, (False, True, True))]
