"""What a person sees while a run trains: a bar with the time left on a terminal, else one line an epoch."""

import signal
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """Shows how far a run is; `quiet` shows nothing at all."""

    def __init__(self, total: int, quiet: bool = False) -> None:
        self._total = total
        self._quiet = quiet
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._mark: tuple[int, float] | None = None  # a step, and when it was reached: from where the pace is counted
        self._paced = False
        if self._console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[facts]}"),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("starting", total=total, facts="")

    def __enter__(self) -> "Display":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._quiet:
            return
        if self._bar:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def move(self, phase: str, step: int) -> None:
        """Puts the bar at a step of the whole run."""
        self._mark = self._mark or (step, time.monotonic())
        if self._bar:
            self._bar.update(self._task, description=phase, completed=step)

    def epoch(self, phase: str, epoch: int, epochs: int, step: int, facts: dict[str, Any]) -> None:
        """Shows an epoch's figures."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in facts.items() if value is not None)
        self.move(phase, step)
        if self._bar:
            self._bar.update(self._task, facts=f"epoch {epoch}/{epochs}  {text}")
            if epoch == epochs:
                self.say(f"{phase}  {text}")
            return
        start, since = self._mark or (step, 0.0)
        now = time.monotonic()
        left = ""  # the first epoch compiles too: what it took says nothing of the others
        if self._paced and step > start:
            left = f"  (about {(now - since) * (self._total - step) / (step - start) / 60:.1f} min left)"
        self.say(f"{phase} {epoch}/{epochs}  {text}{left}")
        if not self._paced:
            self._mark, self._paced = (step, now), True


class StopOnce:
    """A context in which the first Ctrl-C asks for a checkpoint and an end; the second ends immediately, as ever."""

    def __init__(self, say: Callable[[str], None], heeds: bool = True) -> None:
        self.asked = False
        self._heeds = heeds and threading.current_thread() is threading.main_thread()
        self._say = say
        self._before: Any = None

    def __enter__(self) -> "StopOnce":
        if self._heeds:
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: Any) -> None:
        del number, frame
        self.asked = True
        signal.signal(signal.SIGINT, self._before)  # a second Ctrl-C is not held back
        self._say("stopping: a checkpoint is written first (Ctrl-C again to stop without)")
