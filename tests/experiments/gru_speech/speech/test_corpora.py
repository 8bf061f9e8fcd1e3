"""Corpora: the generated one, the stand-ins where they are, TIMIT's layout rebuilt on disk, damaged archives."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from experiments.common.data import Blob, DataFileError, DataNotFoundError
from experiments.gru_speech.speech import audio, corpora, corpus, fsdd, phones, timit


def test_tones_need_nothing_and_are_the_same_every_time() -> None:
    a, b = corpora.load("tones", "test"), corpora.load("tones", "test")
    assert len(a.utterances) == 18
    assert len(corpora.load("tones", "train").utterances) == 60
    assert all(np.array_equal(x.samples, y.samples) for x, y in zip(a.utterances, b.utterances, strict=True))
    # Box-Muller and sines may round otherwise on another machine, the labels may not
    assert a.utterances[0].labels[:6] == b.utterances[0].labels[:6]
    for u in a.utterances:
        assert tuple(name for _, _, name in u.segments) == u.labels
        assert u.segments[0][0] == 0
        assert u.segments[-1][1] == len(u.samples)
        assert all(x[1] == y[0] for x, y in zip(u.segments, u.segments[1:], strict=False))
        assert all(x != y for x, y in zip(u.labels, u.labels[1:], strict=False))
    assert not set(a.speakers) & set(corpora.load("tones", "train").speakers)


@pytest.mark.parametrize(
    ("args", "options", "words"),
    [
        (("tone", "test"), {}, "no corpus 'tone'; there are tones"),
        (("tones", "valid"), {}, "no split 'valid'; it has train, dev, test"),
        (("tones", "test"), {"test_speakers": ("x",)}, "has a fixed split"),
    ],
)
def test_impossible_requests(args, options, words) -> None:
    with pytest.raises(ValueError, match=words):
        corpora.load(*args, **options)


# -- TIMIT in its distributed layout -----------------------------------------------------------------------------------


def _timit(folder: Path, upper: bool, sphere: bool = True) -> None:
    def named(text: str) -> str:
        return text.upper() if upper else text

    speakers = (("train", "fcjf0"), ("train", "mdac0"), ("test", "mdab0"), ("test", "faks0"), ("test", "mabc0"))
    for part, speaker in speakers:
        home = folder / named("timit") / named(part) / named("dr1") / named(speaker)
        home.mkdir(parents=True)
        for sentence in ("sa1", "si1027", "sx37"):
            sound = audio.Audio(np.arange(4000, dtype=np.int16), 16_000)
            data = audio.encode_sphere(sound) if sphere else audio.encode_wav(sound)
            (home / named(f"{sentence}.wav")).write_bytes(data)
            (home / named(f"{sentence}.phn")).write_text("0 1000 h#\n1000 2500 sh\n2500 3000 q\n3000 4100 iy\n")


@pytest.mark.parametrize(("upper", "sphere"), [(True, True), (False, False)])
def test_timit_as_it_is_distributed(tmp_path, upper, sphere) -> None:
    _timit(tmp_path, upper, sphere)
    train = corpora.load("timit", "train", tmp_path, sa=False)
    assert [u.name for u in train.utterances] == ["fcjf0/si1027", "fcjf0/sx37", "mdac0/si1027", "mdac0/sx37"]
    assert len(corpora.load("timit", "train", tmp_path, sa=True).utterances) == 6
    test, dev = (corpora.load("timit", s, tmp_path) for s in ("test", "dev"))
    assert test.speakers == ("mdab0",)  # the core test set only; a speaker of neither list is in no split
    assert dev.speakers == ("faks0",)
    assert len(test.utterances) == 2  # sa1 is never scored
    u = test.utterances[0]
    assert u.segments[-1] == (3000, 4000, "iy")  # cut at the end of the sound
    want = [phones.PHONES_39.index(p) for p in ("sil", "sh", "iy")]
    assert test.inventory.folded(test.inventory.trained(u.labels)) == want


def test_the_lists_of_speakers() -> None:
    assert (len(timit.CORE_TEST), len(timit.DEV)) == (24, 50)
    assert not timit.CORE_TEST & timit.DEV
    assert sum(s[0] == "f" for s in timit.CORE_TEST) == 8  # two men and a woman of each of the eight regions


def test_what_is_wrong_with_timit_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("COMPRESSX_DATA", raising=False)
    with pytest.raises(DataNotFoundError, match="no folder timit/.*LDC93S1"):
        corpora.load("timit", "train", tmp_path)
    _timit(tmp_path, False)
    home = tmp_path / "timit/train/dr1/fcjf0"
    (home / "sx37.phn").write_text("0 1000 h#\n900 2000 shh\n")
    with pytest.raises(DataFileError, match=r"sx37.phn: 'shh' is none of TIMIT's 61 phones"):
        corpora.load("timit", "train", tmp_path)
    (home / "sx37.phn").write_text("0 1000 h#\n1200 1100 sh\n")
    with pytest.raises(DataFileError, match="line 2, '1200 1100 sh', is out of order"):
        corpora.load("timit", "train", tmp_path)
    (home / "sx37.phn").unlink()
    with pytest.raises(DataNotFoundError, match="has no .phn file beside it"):
        corpora.load("timit", "train", tmp_path)


# -- archives ----------------------------------------------------------------------------------------------------------


def _zip(**files: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def test_an_archive_that_unpacks_to_too_much_or_is_damaged_is_refused() -> None:
    good = _zip(a=b"1" * 5000, b=b"2")
    assert corpus.read_zip(Blob(Path("x.zip"), good), 6000)["b"] == b"2"
    with pytest.raises(DataFileError, match="more than the 4000 bytes"):
        corpus.read_zip(Blob(Path("x.zip"), good), 4000)
    for damaged in (good[:40], good[:-30], good[:35] + b"\xff\xff\xff\xff" + good[39:], b""):
        with pytest.raises(DataFileError, match="x.zip"):
            corpus.read_zip(Blob(Path("x.zip"), damaged), 6000)


def _digits(tmp_path: Path, speakers: tuple[str, ...], each: int) -> Path:
    rng = np.random.default_rng(3)
    files = {}
    for who in speakers:
        for digit in range(10):
            for index in range(each):
                sound = audio.Audio(rng.integers(-99, 99, 300 + index, dtype=np.int16), 8_000)
                files[f"{digit}_{who}_{index}.wav"] = audio.encode_wav(sound)
    (tmp_path / "fsdd").mkdir()
    (tmp_path / fsdd.FILE).write_bytes(_zip(**files))
    return tmp_path


def test_digits_are_joined_once_each_and_speakers_stay_apart(tmp_path) -> None:
    folder = _digits(tmp_path, ("anna", "ben", "george"), 7)
    train, dev, test = (corpora.load("fsdd", s, folder) for s in corpora.SPLITS)
    assert test.speakers == ("george",)
    assert train.speakers == dev.speakers == ("anna", "ben")
    assert [sum(len(u.labels) for u in c.utterances) for c in (train, dev, test)] == [2 * 10 * 2, 2 * 10 * 5, 70]
    assert {len(u.labels) for u in test.utterances} == {1, 2, 3, 4, 5}
    assert sum(len(u.samples) for u in test.utterances) == 10 * sum(300 + i for i in range(7))
    strict = corpora.load("fsdd", "train", folder, test_speakers=("ben",), dev_speakers=("anna",))
    assert strict.speakers == ("george",)
    official = corpora.load("fsdd", "test", folder, by="official")
    assert official.speakers == ("anna", "ben", "george")
    assert sum(len(u.labels) for u in official.utterances) == 3 * 10 * 5
    for options, words in (
        ({"test_speakers": ("zoe",)}, "no speaker 'zoe'; it has anna"),
        ({"test_speakers": ("ben",), "dev_speakers": ("ben",)}, "cannot be in test and in dev"),
        ({"by": "official", "test_speakers": ("ben",)}, "leave test_speakers"),
        ({"by": "age"}, "split='age'"),
    ):
        with pytest.raises(ValueError, match=words):
            corpora.load("fsdd", "test", folder, **options)


@pytest.mark.data
def test_the_free_sample_of_timit(data_dir) -> None:
    parts = {s: corpora.load("timit_sample", s, data_dir) for s in corpora.SPLITS}
    assert {s: len(c.utterances) for s, c in parts.items()} == {"train": 100, "dev": 16, "test": 16}
    assert parts["test"].speakers == timit.SAMPLE_TEST
    assert len(corpora.load("timit_sample", "train", data_dir, sa=False).utterances) == 80
    assert parts["train"].info.stand_in
    one_out = corpora.load("timit_sample", "test", data_dir, test_speakers=("dr1-fvmh0",))
    assert len(one_out.utterances) == 8


@pytest.mark.data
@pytest.mark.slow
def test_the_free_digits(data_dir) -> None:
    parts = {s: corpora.load("fsdd", s, data_dir) for s in corpora.SPLITS}
    assert {s: sum(len(u.labels) for u in c.utterances) for s, c in parts.items()} == {
        "train": 4 * 450,
        "dev": 4 * 50,
        "test": 500,
    }
