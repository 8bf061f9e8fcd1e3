"""Texts for language models: words as numbers, a vocabulary from the training part, windows that follow one another.

    load(name, data_dir)            the three parts of a text; names in `TEXTS`
    windows(ids, lanes, steps)      contiguous batching for truncated back-propagation

A word is what stands between white space; `<eos>` ends a line, or a paragraph of running prose. What the vocabulary
lacks is `<unk>`: perplexities under different vocabularies cannot be compared, and `Corpus.unknown` says what was lost.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.common.data import text_generated, text_reading
from experiments.common.data.dataset import Array, Arrays, Info
from experiments.common.data.source import (
    GUIDE,
    Blob,
    DataFileError,
    DataNotFoundError,
    File,
    read_blobs,
    search_places,
)

EOS, UNK = "<eos>", "<unk>"
PARTS = ("train", "validation", "test")
Words = list[str]
Parts = dict[str, Words]


@dataclass(frozen=True)
class Corpus:
    """A text in three parts.

    Attributes:
      train: word ids, int32 `[n]`.
      validation: likewise.
      test: likewise.
      words: the vocabulary; id i is `words[i]`, most frequent first.
      unknown: part -> share of its words that the vocabulary lacks.
      info: facts; `classes` is the size of the vocabulary.
      best: where the text is drawn from a known source, the perplexity of that source itself on `test`, which no model
        beats except by sampling error; else None.
    """

    train: Array
    validation: Array
    test: Array
    words: tuple[str, ...]
    unknown: Mapping[str, float]
    info: Info
    best: float | None = None

    def part(self, name: str) -> Array:
        """The ids of "train", "validation" or "test"; ValueError for any other name."""
        if name not in PARTS:
            raise ValueError(f"a text has no part {name!r}; it has {', '.join(PARTS)}")
        ids: Array = getattr(self, name)
        return ids


@dataclass(frozen=True)
class Text:
    """Where a text comes from.

    Attributes:
      info: facts about it.
      files: what it is read from; none for a text that is drawn.
      read: the files' bytes to the words of each part.
      obtain: one line that says where to get the files.
    """

    info: Info
    files: tuple[File, ...]
    read: Callable[[Sequence[Blob]], Parts]
    obtain: str = ""


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    vocabulary: int = 0,
    words: Sequence[str] | None = None,
) -> Corpus:
    """Loads a text, from `data_dir` or `$COMPRESSX_DATA`.

    Args:
      name: a key of `TEXTS`.
      data_dir: folder in the layout of docs/data.md.
      vocabulary: number of words, `<unk>` and `<eos>` among them: the most frequent ones of the training part, ties in
        alphabetical order; 0 is all of them.
      words: a vocabulary to use instead, that of a trained network.

    Raises:
      DataNotFoundError: files are missing; says which, where it looked, and where to get them.
      DataFileError: a file is damaged or is no text.
      ValueError: no such text, or a vocabulary of fewer than 3 words or of more than there are.
    """
    if name not in TEXTS:
        raise ValueError(f"no text {name!r}; there are {', '.join(TEXTS)}")
    text = TEXTS[name]
    parts = text.read(read_blobs(text.files, _find(text, data_dir)))
    for part in PARTS:
        if len(parts[part]) < 2:
            raise DataFileError(f"text {name!r}: its {part} part has {len(parts[part])} words, at least 2 are needed")
    words = choose_vocabulary(parts["train"], vocabulary) if words is None else tuple(words)
    ids = {part: to_ids(parts[part], words) for part in PARTS}
    unknown = {part: float(np.mean(ids[part] == words.index(UNK))) for part in PARTS}
    best = text_generated.perplexity(parts["test"]) if name == "generated" else None
    info = Info(**{**vars(text.info), "classes": len(words)})
    return Corpus(ids["train"], ids["validation"], ids["test"], words, unknown, info, best)


def choose_vocabulary(train: Sequence[str], size: int = 0) -> tuple[str, ...]:
    """The `size` most frequent words, `<unk>` and `<eos>` always among them; ties in alphabetical order."""
    counts = Counter(train)
    special = {UNK: counts.pop(UNK, 0), EOS: counts.pop(EOS, 0)}
    have = len(counts) + 2
    if size and not 3 <= size <= have:
        raise ValueError(f"vocabulary={size} is impossible; it must be 0 (all) or 3 to {have}, the words there are")
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: (size or have) - 2]
    return tuple(word for word, _ in sorted([*ranked, *special.items()], key=lambda item: (-item[1], item[0])))


def to_ids(text: Sequence[str], words: Sequence[str]) -> Array:
    """The numbers of the words, int32 `[n]`; `<unk>`'s where the vocabulary lacks one."""
    number = {word: i for i, word in enumerate(words)}
    unknown = number[UNK]
    return np.fromiter((number.get(word, unknown) for word in text), np.int32, len(text))


def windows(ids: Array, lanes: int, steps: int, whole: bool = False) -> Arrays:
    """Cuts a text into lanes and each lane into windows that follow one another, for `batches.in_order`.

    The text of n words has n - 1 positions to predict: its first word is given. Lane b holds a run of these.

    Args:
      ids: int32 `[n]`.
      lanes: texts read side by side, the batch.
      steps: words a window, through which a gradient runs.
      whole: keep every place, filling the end up with label -1 (evaluation); else the positions left over are dropped.

    Returns:
      `inputs` and `labels` int32 `[lanes * T, steps]`, the word at a place and the one to predict; `fresh` bool
      `[lanes * T]`, whether the window is the first of its lane, where nothing is carried yet.

    Raises:
      ValueError: the text is too short for a window in every lane.
    """
    if lanes < 1 or steps < 1:
        raise ValueError(f"lanes={lanes} and steps={steps} must be at least 1")
    places = len(ids) - 1
    each = lanes * steps
    number = -(-places // each) if whole else places // each
    if number < 1:
        raise ValueError(f"a text of {len(ids)} words is too short for {lanes} lanes of {steps} words")
    used = number * each
    inputs, labels = np.zeros(used, np.int32), np.full(used, -1, np.int32)
    n = min(used, places)
    inputs[:n], labels[:n] = ids[:n], ids[1 : n + 1]
    fresh = np.arange(lanes * number) % number == 0
    return {"inputs": inputs.reshape(-1, steps), "labels": labels.reshape(-1, steps), "fresh": fresh}


def _find(text: Text, data_dir: str | os.PathLike[str] | None) -> list[Path]:
    names = [file.path for file in text.files]
    places = search_places(data_dir)
    for place in places:
        if all((place / name).is_file() for name in names):
            return [place / name for name in names]
    if not names:
        return []
    where = "; ".join(f"{p} (lacks {', '.join(n for n in names if not (p / n).is_file())})" for p in places)
    raise DataNotFoundError(
        f"text {text.info.name!r} not found. Files: {', '.join(names)}. Looked in: "
        f"{where or 'nowhere, for neither data_dir nor $COMPRESSX_DATA is set'}. "
        f"How to obtain it: {text.obtain} ({GUIDE})"
    )


def _lines(blobs: Sequence[Blob]) -> Parts:
    return {part: text_reading.lines(blob) for part, blob in zip(PARTS, blobs, strict=True)}


def _wikitext_partial(blobs: Sequence[Blob]) -> Parts:
    train, test = (text_reading.lines(blob) for blob in blobs)
    cut = len(train) * 9 // 10
    return {"train": train[:cut], "validation": train[cut:], "test": test}


def _prose(blobs: Sequence[Blob]) -> Parts:
    return _in_parts(text_reading.prose(blobs[0]))


def _characters(blobs: Sequence[Blob]) -> Parts:
    return _in_parts(text_reading.characters(blobs[0]))


def _in_parts(words: Words) -> Parts:
    a, b = len(words) * 8 // 10, len(words) * 9 // 10
    return {"train": words[:a], "validation": words[a:b], "test": words[b:]}


_LIMIT = 1 << 26  # bytes of a file, packed or not


def _files(*paths: str) -> tuple[File, ...]:
    return tuple(File(path, _LIMIT) for path in paths)


TEXTS: dict[str, Text] = {
    "generated": Text(
        info=Info(
            name="generated",
            source="sentences drawn from a grammar with topics, seed 0",
            licence="Apache-2.0",
            classes=0,
            shape=(),
            stand_in=True,
            note="for tests and the demonstration; its own perplexity is known, see Corpus.best",
        ),
        files=(),
        read=lambda blobs: text_generated.parts(),
    ),
    "war_and_peace": Text(
        info=Info(
            name="war_and_peace",
            source="Tolstoy, War and Peace (Maude), Project Gutenberg 2600",
            licence="public domain in the USA",
            classes=0,
            shape=(),
            stand_in=True,
            note="stands in for the Penn Treebank; the first 80 % train, the last 10 % test",
        ),
        files=_files("language_model/war_and_peace/warandpeace.txt.gz"),
        read=_prose,
        obtain="Project Gutenberg e-book 2600",
    ),
    "tiny_shakespeare": Text(
        info=Info(
            name="tiny_shakespeare",
            source="40,000 lines of Shakespeare's plays, by characters (A. Karpathy, char-rnn)",
            licence="public domain",
            classes=0,
            shape=(),
            note="read by characters; the first 80 % train, the last 10 % test",
        ),
        files=_files("language_model/tiny_shakespeare/input.txt.gz"),
        read=_characters,
        obtain="char-rnn's data/tinyshakespeare/input.txt, packed by gzip",
    ),
    "wikitext2_partial": Text(
        info=Info(
            name="wikitext2_partial",
            source="WikiText-2: trained on its validation part, tested on three quarters of its test part",
            licence="CC BY-SA",
            classes=0,
            shape=(),
            stand_in=True,
            note="stands in for WikiText-2; perplexities are not those of WikiText-2",
        ),
        files=_files(
            "language_model/wikitext2_partial/wiki.valid.tokens.gz",
            "language_model/wikitext2_partial/wiki.test.first75.tokens.gz",
        ),
        read=_wikitext_partial,
        obtain="the WikiText-2 word-level archive",
    ),
    "ptb": Text(
        info=Info(
            name="ptb",
            source="Penn Treebank, Wall Street Journal, as prepared by Mikolov",
            licence="LDC; not free",
            classes=0,
            shape=(),
            note="929k / 73k / 82k words, a vocabulary of 10,000",
        ),
        files=_files("ptb/ptb.train.txt", "ptb/ptb.valid.txt", "ptb/ptb.test.txt"),
        read=_lines,
        obtain="simple-examples.tgz of T. Mikolov, folder data",
    ),
    "wikitext2": Text(
        info=Info(
            name="wikitext2",
            source="WikiText-2, S. Merity et al., 2016",
            licence="CC BY-SA",
            classes=0,
            shape=(),
            note="2,089k / 218k / 246k words, a vocabulary of 33,278",
        ),
        files=_files("wikitext-2/wiki.train.tokens", "wikitext-2/wiki.valid.tokens", "wikitext-2/wiki.test.tokens"),
        read=_lines,
        obtain="the WikiText-2 word-level archive, wikitext-2-v1.zip",
    ),
}
