import re
import signal

import pytest

from experiments.common.training import progress
from experiments.common.training.progress import Display, StopOnce


def test_the_time_left_does_not_count_the_first_epoch_which_compiles(monkeypatch, capsys) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Display(total=1000) as display:
        display.move("admm", 600)  # resumed there
        for epoch, seconds in ((1, 120.0), (2, 132.0), (3, 144.0)):
            now[0] = seconds
            display.epoch("admm", epoch, 3, 600 + 100 * epoch, {"loss": 0.5, "nothing": None})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  (")[0] for line in lines] == [f"admm {e}/3  loss 0.5" for e in (1, 2, 3)]
    assert "left" not in lines[0]
    left = [float(re.search(r"about ([\d.]+) min", line)[1]) for line in lines[1:]]
    assert left == [0.4, 0.2]


def test_the_first_ctrl_c_asks_and_the_second_interrupts() -> None:
    said: list[str] = []
    started_with = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        _asks_then_interrupts(said)
    finally:
        signal.signal(signal.SIGINT, started_with)


def _asks_then_interrupts(said: list[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopOnce(said.append) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked and "checkpoint" in said[0]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_quiet_display_prints_nothing(capsys) -> None:
    with Display(total=2, quiet=True) as display:
        display.epoch("dense", 1, 2, 1, {"loss": 1.0})
        display.say("words")
    assert capsys.readouterr() == ("", "")
