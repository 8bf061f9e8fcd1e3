"""Texts: vocabulary, contiguous batching, layouts, hostile files, and the drawn text's own perplexity."""

import gzip
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.common.data import batches, ngrams, text, text_generated, text_reading
from experiments.common.data.source import Blob, DataFileError, DataNotFoundError


def _blob(data, name="x.txt"):
    return Blob(Path(name), data)


def test_the_vocabulary_is_the_most_frequent_words() -> None:
    train = "b a b c a b <eos> <eos> d".split()
    assert text.choose_vocabulary(train) == ("b", "<eos>", "a", "c", "d", "<unk>")
    assert text.choose_vocabulary(train, 4) == ("b", "<eos>", "a", "<unk>")
    words = text.choose_vocabulary(train, 4)
    np.testing.assert_array_equal(text.to_ids("a d b zebra".split(), words), [2, 3, 0, 3])
    for size in (1, 2, 7):
        with pytest.raises(ValueError, match=f"vocabulary={size} is impossible; it must be 0 .all. or 3 to 6"):
            text.choose_vocabulary(train, size)


@given(st.integers(2, 60), st.integers(1, 5), st.integers(1, 7), st.booleans())
def test_windows_hold_every_place_once_and_in_order(n, lanes, steps, whole) -> None:
    ids = np.arange(100, 100 + n, dtype=np.int32)
    if not whole and (n - 1) // (lanes * steps) == 0:
        with pytest.raises(ValueError, match="too short for"):
            text.windows(ids, lanes, steps, whole)
        return
    cut = text.windows(ids, lanes, steps, whole)
    order = batches.in_order(len(cut["fresh"]), lanes)
    inputs, labels = (cut[k][order].transpose(1, 0, 2).reshape(-1) for k in ("inputs", "labels"))
    places = [(a, b) for a, b in zip(inputs, labels, strict=True) if b >= 0]
    used = n - 1 if whole else (n - 1) // (lanes * steps) * lanes * steps
    assert places == list(itertools.pairwise(ids))[:used]  # lane after lane, each word predicted once
    assert (labels[used:] == -1).all()
    np.testing.assert_array_equal(cut["fresh"][order], np.arange(len(order))[:, None] == np.zeros((1, lanes)))


def test_batches_in_order() -> None:
    np.testing.assert_array_equal(batches.in_order(6, 2), [[0, 3], [1, 4], [2, 5]])
    with pytest.raises(ValueError, match="7 examples in order cannot be cut into 2 lanes"):
        batches.in_order(7, 2)


def test_lines_and_prose() -> None:
    assert text_reading.lines(_blob(b" the cat \n\n sat")) == ["the", "cat", "<eos>", "<eos>", "sat", "<eos>"]
    book = (
        "Title: X\r\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\r\n\r\nDon’t _go_, he said:\r\n1,234 men!\r\n\r\n"
        "Élan—vital\r\n\r\nEnd of the Project Gutenberg EBook of X\r\n\r\nlicence"
    ).encode()
    assert text_reading.prose(_blob(book)) == (
        "don't go , he said : N men ! <eos> élan — vital <eos>".split()
    )


@pytest.mark.parametrize(
    ("data", "name", "words"),
    [
        (b"caf\xe9", "x.txt", "byte 3 is not UTF-8"),
        (b"one\ntwo \x1b[31m", "x.txt", "line 2 holds the control character"),
        (b"a\x00b", "x.txt", "line 1 holds the control character"),
        ("a \u202e b".encode(), "x.txt", "control character"),
        (b" \n ", "x.txt", "the file is empty"),
        (b"no gzip", "x.txt.gz", "not a sound gzip file"),
        (gzip.compress(b"a word")[:-5], "x.txt.gz", "not a sound gzip file"),
        (gzip.compress(b"a " * (text_reading.LIMIT // 2 + 1)), "x.txt.gz", "unpacks to more than"),
    ],
    ids=range(8),
)
def test_hostile_files_get_one_message(data, name, words) -> None:
    with pytest.raises(DataFileError, match=words) as caught:
        text_reading.lines(_blob(data, name))
    assert str(caught.value).startswith(name)


def _ptb(folder, train=b"a b c\na b\n", valid=b"a b\n", test=b"a d c\n"):
    (folder / "ptb").mkdir()
    for part, data in (("train", train), ("valid", valid), ("test", test)):
        (folder / "ptb" / f"ptb.{part}.txt").write_bytes(data)
    return folder


def test_the_layout_of_the_penn_treebank(tmp_path) -> None:
    corpus = text.load("ptb", _ptb(tmp_path))
    assert corpus.words == ("<eos>", "a", "b", "c", "<unk>")
    np.testing.assert_array_equal(corpus.test, [1, 4, 3, 0])
    assert corpus.unknown == {"train": 0.0, "validation": 0.0, "test": 0.25}
    assert corpus.info.classes == 5 and not corpus.info.stand_in and corpus.best is None
    other = text.load("ptb", tmp_path, words=("<unk>", "c", "<eos>"))
    np.testing.assert_array_equal(other.test, [0, 0, 1, 2])
    with pytest.raises(ValueError, match="no part 'dev'; it has train, validation, test"):
        corpus.part("dev")


def test_what_is_missing_or_damaged_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("COMPRESSX_DATA", raising=False)
    with pytest.raises(DataNotFoundError, match=r"wikitext-2/wiki.train.tokens.*nowhere.*wikitext-2-v1.zip"):
        text.load("wikitext2")
    with pytest.raises(DataNotFoundError, match=r"lacks language_model/war_and_peace/warandpeace.txt.gz"):
        text.load("war_and_peace", tmp_path)
    with pytest.raises(ValueError, match="no text 'tolstoy'; there are generated, war_and_peace"):
        text.load("tolstoy")
    with pytest.raises(DataFileError, match=r"ptb.test.txt: the file is empty"):
        text.load("ptb", _ptb(tmp_path, test=b"\n"))
    book = tmp_path / "language_model" / "war_and_peace"
    book.mkdir(parents=True)
    (book / "warandpeace.txt.gz").write_bytes(gzip.compress(b"one word"))
    with pytest.raises(DataFileError, match="its validation part has 0 words, at least 2"):
        text.load("war_and_peace", tmp_path)


def test_the_drawn_text_is_the_same_everywhere() -> None:
    corpus = text.load("generated")
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == (48_000, 6_000, 6_000)
    assert len(corpus.words) == 128
    assert text_generated.draw(0, 0, 12) == text_generated.parts()["train"][:12]
    assert int(np.sum(corpus.train.astype(np.int64) * (np.arange(48_000) % 997))) == 625_566_593
    assert corpus.best == pytest.approx(4.1, abs=0.15)


def test_the_sources_perplexity_is_the_sum_over_all_paths() -> None:
    """Against the sum over every sequence of states, for a few words."""
    moves, says, words = text_generated._model()
    sample = text_generated.parts()["test"][:4]
    ids = [words.index(w) for w in sample]
    start = text_generated._start()

    def total(n):
        live = [np.flatnonzero(says[:, i]) for i in ids[:n]]
        out = 0.0
        for path in itertools.product(*live):
            p = start[path[0]] * says[path[0], ids[0]]
            for a, b, i in zip(path, path[1:], ids[1:n], strict=False):
                p *= moves[a, b] * says[b, i]
            out += p
        return out

    assert text_generated.perplexity(sample) == pytest.approx((total(1) / total(4)) ** (1 / 3), rel=1e-9)
    np.testing.assert_allclose(moves.sum(1), 1.0)
    np.testing.assert_allclose(says.sum(1), 1.0)


def test_count_models_by_hand() -> None:
    train, test = np.array([0, 1, 0, 2, 0, 1, 1]), np.array([0, 1, 2, 0])
    counts = np.array([3, 3, 1, 0]) + 1
    want = [counts[w] / 11 for w in test[1:]]
    assert ngrams.unigram_perplexity(train, test, 4) == pytest.approx(math.exp(-np.mean(np.log(want))))
    pairs = [(0, 1), (1, 0), (0, 2), (2, 0), (0, 1), (1, 1)]
    kinds = set(pairs)
    q = np.array([sum(b == w for _, b in kinds) + 0.5 for w in range(4)])
    q /= q.sum()

    def p(v, w):
        c = sum(a == v for a, _ in pairs)
        n = sum(a == v for a, _ in kinds)
        return max(pairs.count((v, w)) - 0.75, 0) / c + 0.75 * n / c * q[w]

    want = [p(v, w) for v, w in itertools.pairwise(test)]
    assert ngrams.bigram_perplexity(train, test, 4) == pytest.approx(math.exp(-np.mean(np.log(want))))
    assert sum(p(0, w) for w in range(4)) == pytest.approx(1.0)
    alone = ngrams.bigram_perplexity(train, np.array([3, 1]), 4)  # nothing follows 3: the lower order
    assert alone == pytest.approx(1 / q[1])


def test_a_character_is_a_word(tmp_path: Path) -> None:
    folder = tmp_path / "language_model" / "tiny_shakespeare"
    folder.mkdir(parents=True)
    (folder / "input.txt.gz").write_bytes(gzip.compress(b"To be,\nor not\n" * 10))
    corpus = text.load("tiny_shakespeare", tmp_path)
    parts = [[corpus.words[i] for i in corpus.part(p)] for p in text.PARTS]
    assert parts[0][:8] == ["T", "o", " ", "b", "e", ",", "<eos>", "o"]
    assert "".join(sum(parts, [])).replace("<eos>", "\n") == "To be,\nor not\n" * 10
    assert [len(p) for p in parts] == [112, 14, 14] and set(corpus.unknown.values()) == {0.0}


@pytest.mark.data
def test_the_stand_ins(data_dir) -> None:
    book = text.load("war_and_peace", data_dir, 2048)
    n = len(book.train) + len(book.validation) + len(book.test)
    assert abs(len(book.train) / n - 0.8) < 1e-4 and len(book.words) == 2048 and book.info.stand_in
    assert 0.05 < book.unknown["test"] < 0.2
    assert "gutenberg" not in text.load("war_and_peace", data_dir).words
    wiki = text.load("wikitext2_partial", data_dir, 2048)
    assert len(wiki.train) + len(wiki.validation) == 217_646 and len(wiki.test) == 201_743
