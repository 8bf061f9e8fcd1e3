"""Speech corpora by name, in the folders that docs/data.md describes."""

from __future__ import annotations

import os
from collections.abc import Sequence

from experiments.gru_speech.speech import fsdd, timit, tones
from experiments.gru_speech.speech.corpus import Corpus

SPLITS = ("train", "dev", "test")
CORPORA = ("tones", "fsdd", "timit_sample", "timit")


def load(
    name: str,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    phones: int = 48,
    sa: bool = True,
    by: str = "speaker",
    test_speakers: Sequence[str] = (),
    dev_speakers: Sequence[str] = (),
) -> Corpus:
    """A split of a corpus, searched for in `data_dir`, then in `$COMPRESSX_DATA`.

    Args:
      name: one of `CORPORA`; "tones" needs no file.
      split: "train", "dev" or "test".
      data_dir: folder in the layout of docs/data.md.
      phones: TIMIT's phones that are trained, 39, 48 or 61; always 39 are scored.
      sa: TIMIT: whether training keeps the two sentences that everybody reads; they are never scored.
      by: fsdd: "speaker" or "official".
      test_speakers: fsdd by speaker and timit_sample: who is tested, () for the usual ones.
      dev_speakers: likewise.

    Raises:
      DataNotFoundError, DataFileError: a file is missing or damaged; says which.
      ValueError: no such corpus, split, speaker, or number of phones.
    """
    if name not in CORPORA:
        raise ValueError(f"no corpus {name!r}; there are {', '.join(CORPORA)}")
    if split not in SPLITS:
        raise ValueError(f"corpus {name!r} has no split {split!r}; it has {', '.join(SPLITS)}")
    if (test_speakers or dev_speakers) and name not in ("fsdd", "timit_sample"):
        raise ValueError(f"corpus {name!r} has a fixed split; leave test_speakers and dev_speakers out")
    if name == "tones":
        return tones.load(split)
    if name == "fsdd":
        return fsdd.load(split, data_dir, by, test_speakers, dev_speakers)
    if name == "timit_sample":
        return timit.load_sample(split, data_dir, phones, sa, test_speakers, dev_speakers)
    return timit.load(split, data_dir, phones, sa)
