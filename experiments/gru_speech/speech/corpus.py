"""What a speech corpus is in memory: recordings with who spoke and what was said, and when where that is known."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from experiments.common.data import Blob, DataFileError, Info
from experiments.gru_speech.speech.phones import Inventory

Segment = tuple[int, int, str]  # first sample, sample after the last, label


class Utterance(NamedTuple):
    """A recording.

    Attributes:
      name: unique in the corpus.
      speaker: who.
      samples: int16 `[n]`.
      labels: the units said, in the corpus's own names.
      segments: the same with their samples; empty where nobody aligned them.
    """

    name: str
    speaker: str
    samples: np.ndarray
    labels: tuple[str, ...]
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """A split of a corpus.

    Attributes:
      utterances: sorted by name.
      rate: samples a second.
      inventory: the units trained and scored.
      unit: "phone" or "word"; the metric is named after it.
      info: facts for reports.
    """

    utterances: tuple[Utterance, ...]
    rate: int
    inventory: Inventory
    unit: str
    info: Info

    @property
    def seconds(self) -> float:
        """Length of all recordings."""
        return sum(len(u.samples) for u in self.utterances) / self.rate

    @property
    def speakers(self) -> tuple[str, ...]:
        """All speakers, sorted."""
        return tuple(sorted({u.speaker for u in self.utterances}))


def read_zip(blob: Blob, limit: int) -> Mapping[str, bytes]:
    """The files of a zip archive by name, nothing written to disk.

    Raises:
      DataFileError: damaged, or unpacks to more than `limit` bytes.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(blob.data)) as archive:
            members = [m for m in archive.infolist() if not m.is_dir()]
            if sum(m.file_size for m in members) > limit:
                raise DataFileError(f"{blob.path}: unpacks to more than the {limit} bytes expected")
            out = {}
            for member in members:
                if member.filename in out:
                    raise DataFileError(f"{blob.path}: entry {member.filename!r} occurs twice")
                with archive.open(member) as stream:  # the size in the archive's list may lie: never read further
                    out[member.filename] = stream.read(member.file_size + 1)
                if len(out[member.filename]) != member.file_size:
                    raise DataFileError(f"{blob.path}: entry {member.filename!r} is not as long as it says")
            return out
    except DataFileError:
        raise
    except (zipfile.BadZipFile, OSError, RuntimeError, ValueError, EOFError, NotImplementedError, KeyError) as error:
        raise DataFileError(f"{blob.path}: not a sound zip file ({error}); fetch it again") from error
    except Exception as error:  # zlib.error and the other decompressors' own kinds
        raise DataFileError(f"{blob.path}: not a sound zip file ({type(error).__name__}); fetch it again") from error


def read_segments(blob: Blob, samples: int) -> tuple[Segment, ...]:
    """A .phn or .wrd file: lines `first after label` in order, inside the recording of so many samples.

    TIMIT's own labels end a few samples after some recordings; what lies beyond the end is cut.

    Raises:
      DataFileError: names the line.
    """
    out: list[Segment] = []
    for number, line in enumerate(blob.data.decode("utf-8", "replace").splitlines(), 1):
        parts = line.split()
        if not parts:
            continue
        where = f"{blob.path}: line {number}, {line.strip()!r:.60},"
        if len(parts) != 3 or not (parts[0].isdigit() and parts[1].isdigit()) or max(map(len, parts)) > 40:
            raise DataFileError(f"{where} is not `first after label`")
        first, after = int(parts[0]), int(parts[1])
        if first >= after or (out and first < out[-1][0]):
            raise DataFileError(f"{where} is out of order")
        out.append((first, min(after, samples), parts[2]))
    if not out:
        raise DataFileError(f"{blob.path}: holds no labels")
    return tuple(out)
