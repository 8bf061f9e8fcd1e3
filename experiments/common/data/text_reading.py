"""Bytes of a text file to words; the file may be anyone's."""

from __future__ import annotations

import re

from experiments.common.data.readers import gunzip
from experiments.common.data.source import Blob, DataFileError

LIMIT = 1 << 26  # bytes that a packed file may unfold to
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_HEADER = re.compile(r"^\*\*\* ?START OF TH(IS|E) PROJECT GUTENBERG.*$", re.M)
_FOOTER = re.compile(r"^(\*\*\* ?END OF TH(IS|E) PROJECT GUTENBERG|End of (the )?Project Gutenberg).*$", re.M)
_TOKEN = re.compile(r"[0-9]+(?:[.,][0-9]+)*|[^\W_0-9]+(?:['’][^\W_0-9]+)*|[^\w\s]")


def decode(blob: Blob) -> str:
    """The file's text: UTF-8, packed by gzip if its name ends in .gz, lines ended by one newline.

    Raises:
      DataFileError: damaged, too large, not UTF-8, or with control characters (which a terminal would obey).
    """
    data = gunzip(blob, LIMIT) if blob.path.suffix == ".gz" else blob.data
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataFileError(f"{blob.path}: byte {error.start} is not UTF-8 text") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    found = _CONTROL.search(text)
    if found:
        line = text.count("\n", 0, found.start()) + 1
        raise DataFileError(f"{blob.path}: line {line} holds the control character {found[0]!r}; it is no text")
    if not text.strip():
        raise DataFileError(f"{blob.path}: the file is empty")
    return text


def lines(blob: Blob) -> list[str]:
    """Words of a tokenised text, as they stand; every line, an empty one too, ends in `<eos>`."""
    text = decode(blob)
    return (text if text.endswith("\n") else text + "\n").replace("\n", " <eos> ").split()


def prose(blob: Blob) -> list[str]:
    """Words of running prose in the manner of the Penn Treebank: lower case, numbers as `N`, paragraphs end in `<eos>`.

    A Project Gutenberg header and footer are left out. A word keeps its inner apostrophes; every other mark that is no
    white space is a word of its own. The underscores that mark italics are dropped.
    """
    text = decode(blob)
    start, end = _HEADER.search(text), _FOOTER.search(text)
    body = text[start.end() if start else 0 : end.start() if end else len(text)]
    words: list[str] = []
    for paragraph in re.split(r"\n[ \t]*\n", body.lower()):
        found = _TOKEN.findall(paragraph)
        if found:
            words += ["N" if token[0].isdecimal() else token.replace("’", "'") for token in found]
            words.append("<eos>")
    return words


def characters(blob: Blob) -> list[str]:
    """Every character as a word of its own; the end of a line is `<eos>`, a space is itself."""
    return ["<eos>" if c == "\n" else c for c in decode(blob)]
