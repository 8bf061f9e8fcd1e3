"""The Free Spoken Digit Dataset as strings of digits: recordings of one speaker, one after the other.

The recordings are single digits. A string joins 1 to 5 recordings of a speaker, each recording in exactly one string;
which ones is drawn from a fixed seed. So a word error rate has its three kinds of errors, and where a digit ends has to
be found too.

    by "speaker"    all recordings of the test speakers (by default george) are for testing; of the other speakers
                    indices 0 to 4 are for dev, the rest for training; or dev speakers of their own are given
    by "official"   indices 0 to 4 of every digit and speaker are for testing, 5 to 9 for dev, the rest
                    for training

Source: Z. Jackson et al., "Free Spoken Digit Dataset", github.com/Jakobovski/free-spoken-digit-dataset.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.common.data import Blob, DataFileError, Info, find_file
from experiments.common.data.batches import epoch_order
from experiments.gru_speech.speech import audio, phones
from experiments.gru_speech.speech.corpus import Corpus, Utterance, read_zip

FILE = "fsdd/recordings.zip"
RATE = 8_000
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST = ("george",)
LONGEST = 5
_NAME = re.compile(r"(?:.*/)?(\d)_([a-z0-9]+)_(\d+)\.wav")

INFO = Info(
    name="fsdd",
    source="Free Spoken Digit Dataset, 5 speakers, recordings joined to strings of digits",
    licence="CC BY-SA 4.0",
    classes=len(DIGITS),
    shape=(),
    class_names=DIGITS,
    stand_in=True,
    note="stands in for a corpus of connected digits",
)


def load(
    split: str, data_dir: str | os.PathLike[str] | None, by: str, test: Sequence[str], dev: Sequence[str]
) -> Corpus:
    """A split as strings of digits.

    Args:
      split: "train", "dev" or "test".
      data_dir: folder that holds `fsdd/`, or None to search `$COMPRESSX_DATA`.
      by: "speaker", nobody tested is heard in training; or "official".
      test: the test speakers of "speaker", () for `TEST`.
      dev: dev speakers, kept out of training; () for indices 0 to 4 of the training speakers.

    Raises:
      DataNotFoundError, DataFileError, ValueError: names the file or the speaker.
    """
    if by not in ("speaker", "official"):
        raise ValueError(f"split={by!r} is impossible; it must be speaker or official")
    path = find_file(FILE, data_dir)
    files = read_zip(Blob(path, path.read_bytes()), 256 << 20)
    found: list[tuple[str, int, int, str]] = []  # speaker, index, digit, file
    for name in sorted(files):
        match = _NAME.fullmatch(name)
        if match is None:
            raise DataFileError(f"{path}: {name!r:.80} is not named digit_speaker_index.wav")
        found.append((match[2], int(match[3]), int(match[1]), name))
    speakers = sorted({who for who, *_ in found})
    if by == "official":
        if test or dev:
            raise ValueError("the official split has all speakers everywhere; leave test_speakers and dev_speakers out")
        chosen = [f for f in found if split == ("test" if f[1] < 5 else "dev" if f[1] < 10 else "train")]
    else:
        test = tuple(test) or TEST
        for who in (*test, *dev):
            if who not in speakers:
                raise ValueError(f"fsdd has no speaker {who!r}; it has {', '.join(speakers)}")
        if set(test) & set(dev):
            raise ValueError(f"{', '.join(sorted(set(test) & set(dev)))}: a speaker cannot be in test and in dev")
        chosen = [f for f in found if split == _home(f[0], f[1], test, dev)]
    utterances = []
    for speaker in sorted({who for who, *_ in chosen}):
        mine = [f for f in chosen if f[0] == speaker]
        utterances += _strings(speaker, [(d, _sound(path, name, files[name])) for _, _, d, name in mine])
    return Corpus(tuple(utterances), RATE, phones.plain(DIGITS), "word", INFO)


def _home(speaker: str, index: int, test: Sequence[str], dev: Sequence[str]) -> str:
    if speaker in test:
        return "test"
    return "dev" if (speaker in dev if dev else index < 5) else "train"


def _sound(path: Path, name: str, data: bytes) -> np.ndarray:
    heard = audio.wav(Blob(path / name, data))
    if heard.rate != RATE:
        raise DataFileError(f"{path}/{name}: {heard.rate} samples a second; the set has {RATE}")
    return heard.samples


def _strings(speaker: str, recordings: list[tuple[int, np.ndarray]]) -> list[Utterance]:
    """Every recording once, in strings of 1 to `LONGEST`, as drawn from the speaker's name alone."""
    seed = int.from_bytes(speaker.encode()[:8].ljust(8, b"\0"), "little")
    order = [recordings[int(i)] for i in epoch_order(seed, 0, len(recordings))]
    lengths = epoch_order(seed, 1, 5040) % LONGEST + 1
    out: list[Utterance] = []
    at = 0
    while at < len(order):
        part = order[at : at + int(lengths[len(out) % 5040])]
        at += len(part)
        ends = np.cumsum([len(s) for _, s in part])
        labels = tuple(DIGITS[d] for d, _ in part)
        segments = tuple((int(e) - len(s), int(e), DIGITS[d]) for e, (d, s) in zip(ends, part, strict=True))
        name = f"{speaker}/{len(out):03d}"
        out.append(Utterance(name, speaker, np.concatenate([s for _, s in part]), labels, segments))
    return out
