"""A round, for the server: which messages it takes, how they are averaged, when the model is pruned. Pure, NumPy.

    UPDATE   W <- W + sum_k n_k / n * D_k        D_k: what client k adds to the model it was sent
    WEIGHTS  W <- sum_k n_k / n * W_k            per-client masks: client models of different supports

over the clients whose message was accepted, in order of their numbers, in float64, rounded once to float32. After the
warm-up the model is pruned: each layer keeps its `budget` largest magnitudes, ties to the lower index. With one mask
for all (`common`) that happens once; with masks of the clients' own (`client`) after every round, because the average
of differently pruned models is denser than any of them.

Source: H. B. McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", 2017,
algorithm 1.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from compressx.federated.trusted import messages
from compressx.federated.trusted.messages import Layer, Message
from compressx.federated.trusted.refused import Refused

Array = npt.NDArray[Any]
SPARSIFY = ("none", "update", "common", "client")


@dataclass(frozen=True)
class Plan:
    """Everything public that server and clients agree on; its hash is bound into every quote.

    Attributes:
      layers: the model's layers and their budgets.
      roster: client -> (Ed25519 public key in hex, number of examples).
      rounds: how many.
      sparsify: "none"; "update": every update within the budgets; "common": one mask for all from `prune_round` on;
        "client": each client's model within the budgets from `prune_round` on.
      prune_round: first round of the pruned model.
      value_type: "float32", "float16" or "int8" on the wire.
      padded: messages are filled up to a size that is the same for all.
      oblivious: only codes that are added without data-dependent accesses.
      quorum: clients without which a round does not close.
      release: the host may have the model in the clear.
      initial: SHA-256 of the first model, hex.
    """

    layers: tuple[Layer, ...]
    roster: Mapping[int, tuple[str, int]]
    rounds: int
    sparsify: str = "none"
    prune_round: int = 0
    value_type: str = "float32"
    padded: bool = False
    oblivious: bool = False
    quorum: int = 1
    release: bool = False
    initial: str = ""

    def __post_init__(self) -> None:
        messages.check_layout(self.layers)
        if self.sparsify not in SPARSIFY or self.value_type not in messages.VALUES:
            given = f"sparsify={self.sparsify!r}, value_type={self.value_type!r}"
            raise ValueError(f"{given}: need one of {SPARSIFY} and {messages.VALUES}")
        if not 1 <= self.quorum <= len(self.roster):
            raise ValueError(f"quorum={self.quorum} is impossible with {len(self.roster)} clients")
        if any(examples < 1 for _, examples in self.roster.values()):
            raise ValueError("every client of the roster needs at least one example")

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        fields = asdict(self) | {"layers": [list(x) for x in self.layers]}
        fields["roster"] = {str(k): list(v) for k, v in self.roster.items()}
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Plan":
        """Inverse of `to_bytes`."""
        fields = json.loads(data)
        fields["layers"] = tuple(Layer(str(n), int(s), int(b), bool(e)) for n, s, b, e in fields["layers"])
        fields["roster"] = {int(k): (str(v[0]), int(v[1])) for k, v in fields["roster"].items()}
        return cls(**fields)

    def hash(self) -> bytes:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_bytes()).digest()

    def pruned(self, round_: int) -> bool:
        """Whether the model of that round is within the budgets."""
        return self.sparsify in ("common", "client") and round_ >= self.prune_round

    @property
    def value_code(self) -> int:
        """`values` as messages know it."""
        return messages.VALUES.index(self.value_type)

    def open_layout(self) -> tuple[Layer, ...]:
        """The layers without budgets."""
        return tuple(layer._replace(budget=layer.size) for layer in self.layers)


class State(NamedTuple):
    """The model at the start of a round.

    Attributes:
      round: its number, from 0.
      layers: float32 `[size]` each.
      masks: bool `[size]` for every layer with a budget below its size, once the model is pruned; else None.
      hash: SHA-256 of the state before and of this model: names this state and its whole history.
      counted: client -> 1 + the last round in which its update was counted.
    """

    round: int
    layers: tuple[Array, ...]
    masks: tuple[Array | None, ...]
    hash: bytes
    counted: dict[int, int]


class Closed(NamedTuple):
    """What may be said of a closed round: its clients, and the non-zeros of the average before and after pruning."""

    round: int
    clients: tuple[int, ...]
    before: int
    after: int


def model_hash(layers: Sequence[Array]) -> bytes:
    """SHA-256 over the weights."""
    digest = hashlib.sha256()
    for x in layers:
        digest.update(np.ascontiguousarray(x, "<f4").tobytes())
    return digest.digest()


def _chain(before: bytes, round_: int, layers: Sequence[Array], masks: Sequence[Array | None]) -> bytes:
    digest = hashlib.sha256(before + round_.to_bytes(4, "little") + model_hash(layers))
    for mask in masks:
        digest.update(b"-" if mask is None else np.packbits(mask).tobytes())
    return digest.digest()


def initial(plan: Plan, layers: Sequence[Array]) -> State:
    """The state of round 0.

    Raises:
      Refused: the model is not the plan's ("policy").
    """
    flat = tuple(np.ascontiguousarray(x, np.float32).reshape(-1) for x in layers)
    if [x.size for x in flat] != [layer.size for layer in plan.layers] or model_hash(flat).hex() != plan.initial:
        raise Refused("policy", "the first model is not the one the plan names")
    masks: tuple[Array | None, ...] = (None,) * len(flat)
    if plan.pruned(0):
        flat, masks = prune(plan, flat)
    return State(0, flat, masks, _chain(plan.hash(), 0, flat, masks), {})


def top_k(x: Array, k: int) -> Array:
    """The mask of the k largest magnitudes, ties to the lower index."""
    mask = np.zeros(x.size, bool)
    mask[np.argsort(-np.abs(x), kind="stable")[:k]] = True
    return mask


def prune(plan: Plan, layers: Sequence[Array]) -> tuple[tuple[Array, ...], tuple[Array | None, ...]]:
    """Every layer within its budget, and the masks."""
    masks = [
        top_k(x, layer.budget) if layer.budget < layer.size else None
        for x, layer in zip(layers, plan.layers, strict=True)
    ]
    return tuple(x if m is None else np.where(m, x, np.float32(0)) for x, m in zip(layers, masks, strict=True)), tuple(
        masks
    )


def write_model(plan: Plan, state: State, knows_masks: bool) -> bytes:
    """The message that carries the model; `knows_masks` where the client holds the masks already."""
    pruned = plan.pruned(state.round)
    shared = pruned and plan.sparsify == "common" and knows_masks
    layout = plan.layers if pruned else plan.open_layout()
    return messages.write(
        state.layers,
        layout,
        kind=messages.WEIGHTS,
        values=plan.value_code,
        masks=state.masks if pruned else None,
        shared=shared,
        codes=(messages.BITMAP, messages.DELTA),
        pad=messages.padded_bytes(layout, plan.value_code, shared) if plan.padded else 0,
    )


def upload_form(plan: Plan, round_: int) -> tuple[int, tuple[Layer, ...], bool]:
    """Kind, layout and whether supports are shared, of the uploads of a round."""
    if plan.pruned(round_):
        return (
            (messages.UPDATE if plan.sparsify == "common" else messages.WEIGHTS),
            plan.layers,
            plan.sparsify == "common",
        )
    return messages.UPDATE, plan.layers if plan.sparsify == "update" else plan.open_layout(), False


def upload_codes(plan: Plan) -> tuple[int, ...]:
    """The codes a client may choose from."""
    return (messages.DENSE, messages.BITMAP) if plan.oblivious else (messages.DENSE, messages.BITMAP, messages.DELTA)


def upload_size(plan: Plan, round_: int) -> int:
    """The exact size of padded uploads of a round; 0 where they are not padded."""
    _, layout, shared = upload_form(plan, round_)
    return messages.padded_bytes(layout, plan.value_code, shared) if plan.padded else 0


def read_upload(plan: Plan, state: State, data: bytes) -> Message:
    """Parses a client's message of this round.

    Raises:
      Refused: "size" or "message".
    """
    kind, layout, shared = upload_form(plan, state.round)
    supports = [None if m is None else np.flatnonzero(m) for m in state.masks] if shared else None
    codes: tuple[int, ...] = (messages.SHARED,) if shared else upload_codes(plan)
    message = messages.parse(
        data,
        layout,
        kind=kind,
        values=plan.value_code,
        supports=supports,
        size=upload_size(plan, state.round),
        codes=codes,
        unlisted=plan.oblivious,
    )
    if plan.oblivious:
        for piece, layer in zip(message.pieces, layout, strict=True):
            if piece.code == messages.BITMAP and piece.values.size != layer.budget:
                raise Refused(
                    "message", f"{layer.name}: {piece.values.size} values; oblivious rounds need {layer.budget}"
                )
    return message


def close(plan: Plan, state: State, accepted: Mapping[int, Message]) -> tuple[State, Closed]:
    """The next state, from the messages of this round.

    Raises:
      ValueError: fewer messages than the quorum.
    """
    if len(accepted) < plan.quorum:
        raise ValueError(f"round {state.round} has {len(accepted)} updates; its quorum is {plan.quorum}")
    clients = tuple(sorted(accepted))
    total = sum(plan.roster[c][1] for c in clients)
    kind, _, _ = upload_form(plan, state.round)
    layers = []
    for k, layer in enumerate(plan.layers):  # one layer at a time: an enclave's memory is small
        mean = state.layers[k].astype(np.float64) if kind == messages.UPDATE else np.zeros(layer.size)
        for c in clients:
            whole = messages.to_dense(accepted[c].pieces[k], layer.size)
            mean += (plan.roster[c][1] / total) * whole.astype(np.float64)
        layers.append(mean.astype(np.float32))
    before = sum(int(np.count_nonzero(x)) for x in layers)
    flat, masks, number = tuple(layers), state.masks, state.round + 1
    if plan.pruned(number) and (plan.sparsify == "client" or not plan.pruned(state.round)):
        flat, masks = prune(plan, flat)
    counted = state.counted | dict.fromkeys(clients, number)
    after = sum(int(np.count_nonzero(x)) for x in flat)
    return State(number, flat, masks, _chain(state.hash, number, flat, masks), counted), Closed(
        state.round, clients, before, after
    )


def pack_state(state: State) -> bytes:
    """The state as bytes, to be sealed."""
    head = {
        "round": state.round,
        "hash": state.hash.hex(),
        "counted": {str(k): v for k, v in state.counted.items()},
        "sizes": [x.size for x in state.layers],
        "masked": [m is not None for m in state.masks],
    }
    text = json.dumps(head).encode()
    arrays = b"".join(x.astype("<f4").tobytes() for x in state.layers)
    bits = b"".join(np.packbits(m).tobytes() for m in state.masks if m is not None)
    return len(text).to_bytes(4, "little") + text + arrays + bits


def unpack_state(data: bytes) -> State:
    """Inverse of `pack_state`; the bytes come out of a sealed record."""
    length = int.from_bytes(data[:4], "little")
    head, at = json.loads(data[4 : 4 + length]), 4 + length
    layers: list[Array] = []
    masks: list[Array | None] = []
    for size in head["sizes"]:
        layers.append(np.frombuffer(data, "<f4", size, at).astype(np.float32))
        at += 4 * size
    for size, masked in zip(head["sizes"], head["masked"], strict=True):
        if masked:
            masks.append(np.unpackbits(np.frombuffer(data, np.uint8, -(-size // 8), at), count=size).astype(bool))
            at += -(-size // 8)
        else:
            masks.append(None)
    counted = {int(k): int(v) for k, v in head["counted"].items()}
    return State(head["round"], tuple(layers), tuple(masks), bytes.fromhex(head["hash"]), counted)
