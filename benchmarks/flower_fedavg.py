"""FedAvg by Flower's own strategy beside ours: same split, seed, first weights and local training.

    python -m benchmarks.flower_fedavg [--config=digits] [--rounds=20] [--data_dir=DIR] [--results=docs/results]

Three ways in one process, a round of each in turn: Flower's `Server` with its `FedAvg` strategy and plain parameters,
our simulation (one program for all clients), and our protocol (messages sealed for a SIMULATED enclave). No network is
in any of them. Bytes are payloads: what stands in the parameters' tensors of Flower, and in our messages; framing and
encryption apart. All three train with `federated.algorithm`'s local steps, so what differs is the engine.
"""

import argparse
import dataclasses
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read by flwr when it is imported

import jax
import jax.numpy as jnp
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.common import (
    Code,
    FitIns,
    FitRes,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server import Server, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg

from benchmarks.record import environment, record
from benchmarks.training import spread, table
from compressx.federated import algorithm
from compressx.federated.algorithm import Algorithm
from compressx.federated.client import Client
from compressx.federated.host import Loopback
from compressx.federated.simulate import Simulation
from compressx.federated.trusted import attest, sessions
from compressx.federated.trusted.aggregator import Aggregator
from compressx.federated.trusted.quotes import Policy
from compressx.federated.trusted.sealing import FileCounter
from configs import federated as configs
from experiments.common.driver import USER_ERRORS, Options
from experiments.common.training import state
from experiments.federated import arms as federated_arms
from experiments.federated import config as federated_setup
from experiments.federated.config import Config, Setting


class Proxy(ClientProxy):
    """A client of Flower in this process; counts the bytes of the parameters it gets and gives."""

    def __init__(self, number: int, config: Config, alg: Algorithm, setting: Setting, program: Any) -> None:
        super().__init__(cid=str(number))
        self.number, self.alg, self.seed = number, alg, config.seed
        self.data = {k: jnp.asarray(v[setting.split[number]]) for k, v in setting.train.items()}
        self.examples = len(setting.split[number])
        self.none, self.program = (None,) * len(jax.tree.leaves(setting.model)), program
        self.down = self.up = 0

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        """Trains on its examples, as our clients do."""
        self.down += sum(map(len, ins.parameters.tensors))
        round_ = int(ins.config["round"])
        leaves = tuple(jnp.asarray(x) for x in parameters_to_ndarrays(ins.parameters))
        rows = algorithm.local_rows(self.seed, self.alg, round_, self.number, self.examples)
        lr, rho = (jnp.float32(v) for v in self.alg.rates(round_))
        key = algorithm.round_key(self.seed, round_, self.number)
        up = self.program(leaves, self.none, (), self.data, rows, jnp.int32(len(rows)), lr, rho, key)
        out = ndarrays_to_parameters([np.asarray(a + b) for a, b in zip(leaves, up.leaves, strict=True)])
        self.up += sum(map(len, out.tensors))
        return FitRes(Status(Code.OK, ""), out, self.examples, {})

    def _never(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("Flower asked a client for something else than fit: this is not FedAvg alone")

    get_properties = get_parameters = evaluate = reconnect = _never


def flower(config: Config, alg: Algorithm, setting: Setting) -> tuple[Server, list[Proxy]]:
    """Flower's server with its FedAvg, every client in every round."""
    layers, treedef = algorithm.layout(alg, setting.model), jax.tree.structure(setting.model)
    program = jax.jit(algorithm.make_local(setting.loss, alg, layers, treedef, alg.kind(0)))
    clients = [Proxy(k, config, alg, setting, program) for k in range(len(setting.split))]
    first = ndarrays_to_parameters([np.asarray(x) for x in jax.tree.leaves(setting.model)])
    strategy = FedAvg(
        fraction_fit=1.0,
        fraction_evaluate=0.0,
        min_fit_clients=len(clients),
        min_available_clients=len(clients),
        initial_parameters=first,
        on_fit_config_fn=lambda number: {"round": number - 1},
    )
    manager = SimpleClientManager()
    for client in clients:
        manager.register(client)
    server = Server(client_manager=manager, strategy=strategy)
    server.parameters = first
    server.set_max_workers(1)  # one client after the other, as in the other two
    return server, clients


def protocol(config: Config, alg: Algorithm, setting: Setting, folder: Path) -> tuple[Loopback, Aggregator]:
    """Our aggregator and clients with real messages, in this process."""
    identities = [Ed25519PrivateKey.generate() for _ in setting.split]
    keys = [k.public_key().public_bytes_raw().hex() for k in identities]
    plan = federated_setup.make_plan(config, alg, setting, keys)
    attester = attest.SimulatedAttester(b"m" * 32, b"s" * 32)
    first = federated_setup.first_layers(setting.model)
    aggregator = Aggregator(plan, first, attester, folder / "sealed", FileCounter(folder / "counter"))
    verifier = attest.SimulatedVerifier(attester.root, Policy(attester.measurement()))
    clients = {}
    for k, rows in enumerate(setting.split):
        mine = {name: x[rows] for name, x in setting.train.items()}
        clients[k] = Client(k, plan, alg, setting.model, setting.loss, mine, config.seed, identities[k], verifier)
    return Loopback(aggregator, clients), aggregator


def compare(config: Config, alg: Algorithm, setting: Setting) -> dict[str, Any]:
    """Seconds of a round, bytes, accuracy, and how far the models are apart at the end."""
    seconds: dict[str, list[float]] = {"simulation": [], "protocol": [], "flower": []}
    with tempfile.TemporaryDirectory() as folder:
        simulation = Simulation(setting.loss, alg, setting.model, setting.train, setting.split, config.seed)
        loop, aggregator = protocol(config, alg, setting, Path(folder))
        server, proxies = flower(config, alg, setting)
        now, down, up = simulation.start(), 0, 0
        for number in range(alg.rounds):
            begin = time.perf_counter()
            now, ledger = simulation.run(now, number, 1)
            jax.block_until_ready(now.leaves)
            seconds["simulation"].append(time.perf_counter() - begin)
            down, up = down + int(ledger.down.sum()), up + int(ledger.up.sum())
            begin = time.perf_counter()
            loop.round(range(len(setting.split)))
            seconds["protocol"].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            fitted = server.fit_round(server_round=number + 1, timeout=None)
            assert fitted is not None and isinstance(fitted[0], Parameters)
            server.parameters = fitted[0]
            seconds["flower"].append(time.perf_counter() - begin)
        models = {
            "simulation": [np.asarray(x) for x in now.leaves],
            "protocol": aggregator.release(),
            "flower": parameters_to_ndarrays(server.parameters),
        }
    sealed = loop.traffic
    messages = len(setting.split) * alg.rounds
    bytes_ = {
        "simulation": (down, up),
        "protocol": (
            sealed.model_down - messages * (sessions.FRAME_BYTES + 4),
            sealed.update_up - messages * sessions.UPDATE_BYTES,
        ),
        "flower": (sum(c.down for c in proxies), sum(c.up for c in proxies)),
    }
    score = state.make_evaluate(setting.task, config.eval_batch)
    test = jax.tree.map(jnp.asarray, setting.test)
    row: dict[str, Any] = {"case": config.variant, "rounds": alg.rounds, "clients": len(setting.split)}
    for name, leaves in models.items():
        like = jax.tree.leaves(setting.model)
        shaped = [jnp.asarray(x).reshape(y.shape) for x, y in zip(leaves, like, strict=True)]
        model = jax.tree.unflatten(jax.tree.structure(setting.model), shaped)
        figures = score({"params": model["params"]}, {k: v for k, v in model.items() if k != "params"}, test)
        row |= {f"{name}_accuracy": figures["accuracy"], f"{name}_ms": spread([1e3 * s for s in seconds[name][1:]])}
        row |= {f"{name}_down_bytes": bytes_[name][0], f"{name}_up_bytes": bytes_[name][1]}
        away = [np.abs(np.ravel(a) - np.ravel(b)).max() for a, b in zip(leaves, models["flower"], strict=True)]
        row[f"{name}_difference"] = float(max(away))
    for name in ("simulation", "protocol"):
        pairs = zip(seconds["flower"][1:], seconds[name][1:], strict=True)
        row[f"flower_over_{name}"] = spread([a / b for a, b in pairs])
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="digits", help="a variant of configs/federated.py; its dense FedAvg is run")
    parser.add_argument("--rounds", type=int, default=20, help="rounds, at least 4; the first is not timed")
    parser.add_argument("--data_dir", default=os.environ.get("COMPRESSX_DATA"), help="folder of data sets")
    parser.add_argument("--results", type=Path, help="folder for the summaries that the tables are built from")
    args = parser.parse_args()
    if args.rounds < 4:
        parser.error(f"--rounds={args.rounds} must be at least 4")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    try:
        config = federated_setup.read(configs.get_config(args.config))
        setting = federated_setup.make(config, Options(Path("."), data_dir=args.data_dir))
    except (ValueError, *USER_ERRORS) as error:  # an unknown variant, data that are missing
        parser.error(str(error))
    alg = dataclasses.replace(federated_arms.dense(config.algorithm), rounds=args.rounds, participants=0)
    row = compare(config, alg, setting)
    print(table([row]))
    if args.results:
        about = environment(("jax", "flwr", "numpy", "cryptography"))
        record(args.results, "flower_fedavg", {row.pop("case"): row}, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
