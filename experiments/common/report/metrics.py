"""`metrics.jsonl`: one JSON object a line, append-only, safe under kill -9, the same after a resume.

A record has `step` (an int that never falls, counted over the whole run and not per phase) and `phase`; the rest is the
driver's choice. The plots look for `epoch`, `loss`, `accuracy`, and for the dicts by leaf path `primal`, `dual` and
`rho` (`primal_by_set` and `dual_by_set` hold one entry for each set of a leaf that has several). Times of day and
durations do not belong here: they would make a resumed run's file differ from an uninterrupted one's (they go to
`summary.json`).

The order that makes resuming exact: write every record of step s, `sync()`, then save the checkpoint of step s.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from experiments.common.report import _json

_NON_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


class MetricsError(ValueError):
    """A metrics file or record is not what it should be; the message names the file and the line."""


class Series(NamedTuple):
    """One curve: `steps` int64 `[n]` and `values` float64 `[n]`."""

    steps: np.ndarray
    values: np.ndarray


class Phase(NamedTuple):
    """A stretch of training: records of `name` lie in steps `first` to `last`, both included."""

    name: str
    first: int
    last: int


class MetricsWriter:
    """Appends records to a metrics file, each with one write, and cuts off what a resumed run will write again.

    Args:
      path: the file; its folder is made if needed.
      resumed_step: None starts the file anew, throwing away what a run without a checkpoint left. An int keeps the
        records with `step <= resumed_step` and cuts off the rest, a torn last line included.

    Raises:
      MetricsError: on a resume, the file is missing or damaged before the cut.
    """

    def __init__(self, path: str | os.PathLike[str], resumed_step: int | None = None) -> None:
        self.path = Path(path)
        self._last: int | None = None
        if resumed_step is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            keep = 0
        else:
            keep, self._last = _cut(self.path, int(resumed_step))
        self._file: int | None = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.ftruncate(self._file, keep)
        os.fsync(self._file)

    def write(self, step: int, phase: str, **values: Any) -> None:
        """Appends one record; numbers may be NumPy or JAX scalars, NaN and infinities are kept as such.

        Raises:
          MetricsError: the step falls, or the writer is closed.
          TypeError: a value has no JSON form.
        """
        if self._file is None:
            raise MetricsError(f"{self.path} is closed; no record can be added")
        step = int(step)
        if step < 0 or (self._last is not None and step < self._last):
            raise MetricsError(f"step {step} after step {self._last} in {self.path}; steps count over the whole run")
        record = {"step": step, "phase": phase, **_json.plain(values, "record", finite=False)}
        line = (json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode()
        # One write a line: after kill -9 at most the last line is torn. A full disk may write a part: raise, and the
        # part is the torn last line that the next resume cuts off.
        written = os.write(self._file, line)
        if written != len(line):
            raise OSError(f"only {written} of {len(line)} bytes of the record of step {step} fitted into {self.path}")
        self._last = step

    def sync(self) -> None:
        """Forces the records onto the disk; call it before saving the checkpoint of the same step."""
        if self._file is not None:
            os.fsync(self._file)

    def close(self) -> None:
        """Closes the file; closing twice does nothing."""
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads every whole record; a torn last line (one without its newline) is left out, any other damage is an error.

    Args:
      path: a file written by `MetricsWriter`.

    Returns:
      The records in order; non-finite numbers are floats again.

    Raises:
      MetricsError: the file is missing or a line is not a record, naming file and line.
    """
    return [record for _, record in _records(Path(path))]


def series(records: Iterable[Mapping[str, Any]], key: str, phase: str | None = None) -> Series:
    """The curve of one number over steps; records without it (or with null) are left out.

    Args:
      records: from `read_metrics`.
      key: the name, dotted for a number inside a dict (`"test.accuracy"`).
      phase: only this phase, or None for all.
    """
    steps, values = [], []
    for record in records:
        if phase is not None and record.get("phase") != phase:
            continue
        value: Any = record
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, (int, float)):
            steps.append(record["step"])
            values.append(float(value))
    return Series(np.asarray(steps, np.int64), np.asarray(values, np.float64))


def leaf_series(records: Iterable[Mapping[str, Any]], key: str) -> dict[str, Series]:
    """The curves of a dict by leaf path (`primal`, `dual`, `rho`), in the order in which the leaves first appear.

    A plain number under `key` gives one curve named "all leaves".
    """
    collected: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        value = record.get(key)
        if isinstance(value, (int, float)):
            value = {"all leaves": value}
        if not isinstance(value, Mapping):
            continue
        for leaf, number in value.items():
            if isinstance(number, (int, float)):
                steps, values = collected.setdefault(leaf, ([], []))
                steps.append(record["step"])
                values.append(float(number))
    return {
        leaf: Series(np.asarray(steps, np.int64), np.asarray(values, np.float64))
        for leaf, (steps, values) in collected.items()
    }


def phases(records: Sequence[Mapping[str, Any]]) -> list[Phase]:
    """The stretches of equal `phase` in order, each with the first and the last step of its records."""
    out: list[Phase] = []
    for record in records:
        name, step = str(record.get("phase")), int(record["step"])
        if out and out[-1].name == name:
            out[-1] = out[-1]._replace(last=step)
        else:
            out.append(Phase(name, step, step))
    return out


def _restore(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _restore(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restore(item) for item in value]
    return value


def _records(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Every whole record with the byte at which its line ends."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise MetricsError(f"{path} does not exist; a run writes it into its workdir") from None
    out: list[tuple[int, dict[str, Any]]] = []
    end, last = 0, 0
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):  # what follows the last newline is torn, or empty
        end += len(line) + 1
        try:
            record = _json.loads(line)
        except ValueError as error:
            raise MetricsError(f"{path}, line {number}: not a record ({error}); the file is damaged") from None
        step = record.get("step") if isinstance(record, dict) else None
        if not isinstance(step, int) or isinstance(step, bool) or step < last:
            raise MetricsError(f"{path}, line {number}: step {step!r} after {last}; an int that never falls is due")
        last = step
        out.append((end, {key: item if key == "phase" else _restore(item) for key, item in record.items()}))
    return out


def _cut(path: Path, resumed_step: int) -> tuple[int, int | None]:
    """The length to keep and the last step kept."""
    if not path.exists():
        raise MetricsError(
            f"{path} does not exist, but the run resumes at step {resumed_step}; restore it or start in a new workdir"
        )
    keep, last = 0, None
    for end, record in _records(path):
        if record["step"] > resumed_step:
            break
        keep, last = end, record["step"]
    return keep, last
