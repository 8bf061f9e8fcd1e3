"""Ten client processes, Flower's gRPC server over TLS, the aggregator's process; killed and started again."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from compressx.federated.simulate import Simulation
from compressx.federated.trusted import sessions
from configs import federated as configs
from experiments.common.driver import Options
from experiments.federated import config as setup
from experiments.federated import nodes as enrolment

pytestmark = pytest.mark.slow
CLIENTS = 10


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


class Nodes:
    """Processes of one federation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.flags = [
            "--config=configs/federated.py:digits_tiny", f"--workdir={folder}", f"--address=localhost:{free_port()}",
            f"--config.split.clients={CLIENTS}", "--config.algorithm.value_type=float32", "--deadline=600",
        ]  # fmt: skip
        self.environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS",)} | {
            "FLWR_TELEMETRY_ENABLED": "0",
            "JAX_PLATFORMS": "cpu",
        }

    def start(self, *more: str) -> subprocess.Popen:
        path = self.folder.parent / f"{'-'.join(m.strip('-').replace('=', '') for m in more)}.log"
        command = [sys.executable, "-m", "experiments.federated.nodes", *self.flags, *more]
        with open(path, "ab") as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def journal(self) -> list[dict]:
        path = self.folder / "server" / "journal.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, what, seconds: float = 900) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, f"gave up; logs are in {self.folder.parent}"
            time.sleep(0.1)


def test_ten_processes_a_killed_server_and_a_killed_client(tmp_path) -> None:
    nodes = Nodes(tmp_path / "run")
    for k in range(CLIENTS):
        enrolment.enroll(nodes.folder, k)
    assert nodes.start("--role=setup").wait() == 0
    server = nodes.start("--role=server")
    clients = {k: nodes.start("--role=client", f"--number={k}") for k in range(CLIENTS)}
    sealed = nodes.folder / "server" / "enclave" / "sealed"
    try:
        # the second round is under way: some updates are counted, others are not
        nodes.wait_for(lambda: sealed.exists() and 1 <= len(list(sealed.glob("update-000001-*"))) < CLIENTS)
        server.send_signal(signal.SIGKILL)
        clients[3].send_signal(signal.SIGKILL)
        server.wait()
        clients[3].wait()
        # the enclave ends with its host; what it had counted is on the disk
        kept = {p.name for p in sealed.glob("update-000001-*")}
        time.sleep(1)
        server = nodes.start("--role=server")
        clients[3] = nodes.start("--role=client", "--number=3")
        assert server.wait(1200) == 0
        for process in clients.values():
            assert process.wait(120) == 0
    finally:
        for process in (server, *clients.values()):
            if process.poll() is None:
                process.kill()
                process.wait()
    assert kept
    rounds = [r for r in nodes.journal() if r["event"] == "round"]
    assert [r["round"] for r in rounds] == [0, 1, 2]
    assert all(r["clients"] == list(range(CLIENTS)) for r in rounds)  # nobody lost, nobody twice

    config = configs.get_config("digits_tiny")
    config.split.clients, config.algorithm.value_type = CLIENTS, "float32"
    frozen = setup.read(config)
    setting = setup.make(frozen, Options(tmp_path))
    simulation = Simulation(setting.loss, frozen.algorithm, setting.model, setting.train, setting.split, frozen.seed)
    state, ledger = simulation.run(simulation.start(), 0, frozen.algorithm.rounds)
    expected = np.concatenate([np.ravel(x) for x in state.leaves])
    got = np.load(nodes.folder / "server" / "model.npy")
    np.testing.assert_array_equal(got != 0, expected != 0)
    np.testing.assert_allclose(got, expected, atol=5e-5)
    # bytes: the last round ran undisturbed; the difference between two journal lines is what it moved
    before, after = rounds[1]["bytes"], rounds[2]["bytes"]
    down = after["model_down"] - before["model_down"] - CLIENTS * (sessions.FRAME_BYTES + 4)
    up = after["update_up"] - before["update_up"] - CLIENTS * sessions.UPDATE_BYTES
    assert up == ledger.up[2].sum()
    assert down == ledger.down[2].sum()
    result = json.loads((nodes.folder / "server" / "result.json").read_text())
    assert result["enclave"] == "SIMULATED" and result["rounds"] == 3
