"""The federation as real processes: Flower's gRPC server and clients over TLS, the aggregator in a process of its own.

    F="--config=configs/federated.py:digits --workdir=runs/nodes"
    python -m experiments.federated.nodes $F --role=enroll --number=3    on each client: its own key
    python -m experiments.federated.nodes $F --role=setup            on the server: certificates, the plan, once
    python -m experiments.federated.nodes $F --role=server           on the server
    python -m experiments.federated.nodes $F --role=client --number=3    on each client, in any order; again if it died
    python -m experiments.federated.nodes $F --role=local            all of it on this machine

A client's private key is made where the client is, and never leaves it: `enroll` writes `clients/K/identity.key` and
`public/keys/K.hex`, and the second alone is given to the server.
The server may be killed and started again at any time. In the work directory: `public/` is everybody's, `server/` the
server's, `clients/K/` client K's; a deployment copies each to where it belongs. With `--enclave=sgx` the aggregator
runs under Gramine (see `compressx/federated/gramine`), and clients need `--root`, `--measurement` and `--tcb_command`;
otherwise it is SIMULATED.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from compressx.federated import tls
from compressx.federated.client import Client
from compressx.federated.host import Enclave, EnclaveStopped
from compressx.federated.trusted import attest, quotes
from compressx.federated.trusted.attest import Verifier
from compressx.federated.trusted.quotes import Policy
from compressx.federated.trusted.rounds import Plan
from compressx.federated.trusted.sealing import write_durably
from experiments.common import driver
from experiments.common.driver import Options
from experiments.common.training import ConfigError, state
from experiments.federated import config as setup
from experiments.federated.config import Config

flags.DEFINE_enum("role", "local", ["enroll", "setup", "server", "client", "local"], "what this process is")
flags.DEFINE_integer("number", 0, "of the client")
flags.DEFINE_string("address", "localhost:18080", "HOST:PORT of the server")
flags.DEFINE_float("deadline", 600.0, "seconds after which a round closes with its quorum")
flags.DEFINE_float("patience", 600.0, "seconds that a client waits for a server")
flags.DEFINE_enum("enclave", "simulated", ["simulated", "sgx"], "what the aggregator runs in")
flags.DEFINE_string("root", "", "sgx: Intel's SGX root certificate, PEM")
flags.DEFINE_string("measurement", "", "sgx: MRENCLAVE expected, hex")
flags.DEFINE_string("tcb_command", "", "sgx: program that reads a quote and prints the platform's TCB status")


def enroll(folder: Path, number: int) -> None:
    """A client's key, made where the client is; does nothing where it is there."""
    own, public = folder / "clients" / str(number) / "identity.key", folder / "public" / "keys" / f"{number}.hex"
    for path in (own, public):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not own.exists():
        write_secret(own, Ed25519PrivateKey.generate().private_bytes_raw())
    identity = Ed25519PrivateKey.from_private_bytes(own.read_bytes())
    write_durably(public, identity.public_key().public_bytes_raw().hex().encode(), mode=0o644)


def enrolled(folder: Path, count: int) -> list[str]:
    """The public keys of all clients, in hex.

    Raises:
      ConfigError: one is missing, or is no key.
    """
    keys = []
    for number in range(count):
        path = folder / "public" / "keys" / f"{number}.hex"
        if not path.exists():
            told = f"{path} does not exist: run --role=enroll --number={number} on that client, and bring it"
            raise ConfigError(told)
        text = path.read_text().strip()
        if len(text) != 64 or set(text) - set("0123456789abcdef"):
            raise ConfigError(f"{path} holds no public key of 32 bytes in hex")
        keys.append(text)
    return keys


def make_plan(config: Config, options: Options, host: str, simulated: bool) -> None:
    """What has to be agreed on before the first round, from the clients' public keys; once."""
    folder = options.workdir
    if (folder / "public" / "plan.json").exists():
        return
    setting = setup.make(config, options)
    keys = enrolled(folder, len(setting.split))
    (folder / "server" / "enclave").mkdir(parents=True, exist_ok=True)
    certificates = tls.make((host,) if host != "localhost" else ("localhost", "127.0.0.1"))
    (folder / "public" / "authority.pem").write_bytes(certificates.authority)
    (folder / "server" / "server.pem").write_bytes(certificates.server)
    write_secret(folder / "server" / "server.key", certificates.key)
    if simulated:
        machine = os.urandom(32) + attest.make_identity()
        write_secret(folder / "server" / "enclave" / "machine.simulated", machine)
        root = attest.SimulatedAttester(b"", b"", identity=machine[32:]).root
        (folder / "public" / "simulated_root.pem").write_bytes(root)
    plan = setup.make_plan(config, config.algorithm, setting, keys)
    write_durably(folder / "public" / "plan.json", plan.to_bytes(), mode=0o644)


def write_secret(path: Path, data: bytes) -> None:
    """A file that only its owner reads."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)


def read_plan(folder: Path) -> Plan:
    """The plan that was agreed on."""
    path = folder / "public" / "plan.json"
    if not path.exists():
        raise ConfigError(f"{path} does not exist; run --role=setup first")
    return Plan.from_bytes(path.read_bytes())


def agreed(plan: Plan, config: Config, setting: setup.Setting) -> None:
    """A client joins the plan of its own configuration alone: a plan is a file that somebody else hands out.

    Raises:
      ConfigError: a field of the plan differs, named with both values.
    """
    keys = [plan.roster[k][0] if k in plan.roster else "" for k in range(len(setting.split))]
    own = setup.make_plan(config, config.algorithm, setting, keys)
    for field in dataclasses.fields(Plan):
        given, wanted = getattr(plan, field.name), getattr(own, field.name)
        if given != wanted:
            raise ConfigError(
                f"public/plan.json has {field.name}={str(given)[:200]}, this client's configuration "
                f"{str(wanted)[:200]}: it joins no other plan than its own"
            )


def server(config: Config, options: Options, address: str, deadline: float, simulated: bool) -> None:
    """Serves all rounds, then evaluates the released model."""
    from compressx.federated import flower  # flwr takes seconds to import

    folder, plan = options.workdir, read_plan(options.workdir)
    setting = setup.make(config, options)
    own = folder / "server"
    certificates = tls.Certificates(
        (folder / "public" / "authority.pem").read_bytes(),
        (own / "server.pem").read_bytes(),
        (own / "server.key").read_bytes(),
    )
    begin = time.monotonic()
    command = None if simulated else ("gramine-sgx", "aggregator")
    with Enclave(
        own / "enclave", plan, setup.first_layers(setting.model), simulated=simulated, command=command
    ) as enclave:
        host = flower.FederatedServer(
            enclave, plan, config.algorithm, config.seed, deadline, journal=own / "journal.jsonl"
        )
        flower.serve(host, address, certificates)
        result: dict[str, Any] = {
            "enclave": "SIMULATED" if simulated else "SGX",
            "rounds": enclave.status()[0],
            "bytes": vars(host.traffic),
            "seconds": time.monotonic() - begin,
        }
        if plan.release:
            layers = enclave.release()
            np.save(own / "model.npy", np.concatenate(layers))
            leaves, treedef = jax.tree.flatten(setting.model)
            model = jax.tree.unflatten(
                treedef, [jnp.asarray(x.reshape(y.shape)) for x, y in zip(layers, leaves, strict=True)]
            )
            score = state.make_evaluate(setting.task, config.eval_batch)
            others = {k: v for k, v in model.items() if k != "params"}
            result |= score({"params": model["params"]}, others, jax.tree.map(jnp.asarray, setting.test))
    driver.write_text(own / "result.json", json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def client(
    config: Config, options: Options, number: int, address: str, patience: float, verifier: Callable[[Path], Verifier]
) -> None:
    """Takes part until the server says that it is over."""
    from compressx.federated import flower

    folder, plan = options.workdir, read_plan(options.workdir)
    setting = setup.make(config, options)
    if number not in plan.roster:
        raise ConfigError(f"number={number} is impossible; the plan has clients 0 to {len(plan.roster) - 1}")
    agreed(plan, config, setting)
    own = folder / "clients" / str(number)
    identity = Ed25519PrivateKey.from_private_bytes((own / "identity.key").read_bytes())
    mine = {k: v[setting.split[number]] for k, v in setting.train.items()}
    member = Client(
        number, plan, config.algorithm, setting.model, setting.loss, mine, config.seed, identity, verifier(folder), own
    )
    flower.join(member, address, (folder / "public" / "authority.pem").read_bytes(), patience)


def simulated_verifier(folder: Path) -> Verifier:
    """SIMULATED."""
    root = (folder / "public" / "simulated_root.pem").read_bytes()
    return attest.SimulatedVerifier(root, Policy(attest.measure()))


def sgx_verifier(root: str, measurement: str, command: str) -> Callable[[Path], Verifier]:
    """A verifier of real quotes; `command` reads a quote on standard input and prints the status, such as UpToDate."""
    if not (root and measurement and command):
        raise ConfigError("--enclave=sgx needs --root, --measurement and --tcb_command")

    def tcb(quote: quotes.Quote, leaf: Any) -> str:
        done = subprocess.run(command.split(), input=quote.raw, capture_output=True, timeout=60, check=False)
        return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else "Unknown"

    policy = Policy(bytes.fromhex(measurement))
    return lambda folder: attest.DcapVerifier(Path(root).read_bytes(), policy, tcb)


def local(config: Config, options: Options, argv: list[str]) -> None:
    """Server and clients as processes on this machine."""
    own = [a for a in argv if not a.startswith(("--role", "--number"))]

    def start(*more: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, "-m", "experiments.federated.nodes", *own, *more])

    processes = [start("--role=server")]
    processes += [start("--role=client", f"--number={k}") for k in range(config.split.clients)]
    codes = [p.wait() for p in processes]
    if any(codes):
        raise ConfigError(f"processes ended with codes {codes} (server first)")


def run(config: Config, options: Options) -> None:
    """The role of this process."""
    f = flags.FLAGS
    simulated = f.enclave == "simulated"
    driver.claim(options.workdir, dataclasses.asdict(config))
    if f.role == "enroll" and not 0 <= f.number < config.split.clients:
        raise ConfigError(f"number={f.number} is impossible; there are clients 0 to {config.split.clients - 1}")
    for number in {"enroll": [f.number], "local": range(config.split.clients)}.get(f.role, ()):
        enroll(options.workdir, number)
    if f.role in ("setup", "local"):
        make_plan(config, options, f.address.rpartition(":")[0], simulated)
    if f.role == "server":
        try:
            server(config, options, f.address, f.deadline, simulated)
        except EnclaveStopped as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # the transport's threads wait for clients, who are to find the connection closed
    elif f.role == "client":
        make = simulated_verifier if simulated else sgx_verifier(f.root, f.measurement, f.tcb_command)
        client(config, options, f.number, f.address, f.patience, make)
    elif f.role == "local":
        local(config, options, sys.argv[1:])


def evaluate(config: Config, options: Options) -> None:
    """There is nothing to evaluate again: the server writes `server/result.json`."""
    raise ConfigError("--mode=eval is not for real processes; see server/result.json in the work directory")


if __name__ == "__main__":
    driver.main("experiments.federated.nodes", run, evaluate, setup.read)
