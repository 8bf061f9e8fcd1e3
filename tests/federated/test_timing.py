"""The elapsed-time model by hand."""

import numpy as np
import pytest

from compressx.federated.timing import STAGES, Costs, Network, elapsed


def test_a_round_is_its_slowest_client_and_the_server() -> None:
    network = Network(up_mbit=8, down_mbit=80, latency_ms=100, examples_per_second=50, spread=0, slower=2)
    speeds = network.speeds(0, 3)
    assert np.all(speeds == 50)
    costs = Costs(open=0.01, pack=0.02, seal=0.03, take=0.04, average=0.05)
    args = (np.array([0, 2]), np.array([1e6, 1e6]), np.array([1e6, 2e6]), np.array([100, 50]), costs)
    got = elapsed(network, speeds, *args, encrypted=True)
    # client 0: 0.2 down, 2.0 train, 1.1 up; client 2: 0.2, 1.0, 2.1: the same but for 0.0; ties go to the first
    assert got == pytest.approx(
        {"down": 0.2, "open": 0.02, "train": 2.0, "pack": 0.04, "seal": 0.06, "up": 1.1, "server": 0.18}
    )
    assert set(got) == set(STAGES)
    assert elapsed(network, speeds, *args, encrypted=False)["seal"] == 0


def test_speeds_are_a_function_of_the_seed() -> None:
    network = Network(spread=0.5)
    assert np.array_equal(network.speeds(1, 9), network.speeds(1, 9))
    assert not np.array_equal(network.speeds(1, 9), network.speeds(2, 9))


@pytest.mark.parametrize("bad", [{"up_mbit": 0.0}, {"latency_ms": -1.0}, {"examples_per_second": -5.0}])
def test_impossible_networks(bad) -> None:
    with pytest.raises(ValueError):
        Network(**bad)
