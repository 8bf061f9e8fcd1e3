"""TIMIT: the corpus in its distributed layout, and the free sample of it as a stand-in.

    <data_dir>/timit/{train,test}/dr<region>/<speaker>/<sentence>.{wav,phn}      upper or lower case, SPHERE or WAV
    <data_dir>/timit_sample/timit_sample.zip

Of the whole corpus, `test` is the core test set of 24 speakers and `dev` the 50 other test speakers that Kaldi's recipe
takes; sentences sa1 and sa2, which everybody reads, are left out everywhere but, where asked for, in training.

Source: J. Garofolo et al., "TIMIT Acoustic-Phonetic Continuous Speech Corpus", LDC93S1, 1993.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from experiments.common.data import Blob, DataFileError, DataNotFoundError, Info, find_file, search_places
from experiments.common.data.source import GUIDE
from experiments.gru_speech.speech import audio, phones
from experiments.gru_speech.speech.corpus import Corpus, Utterance, read_segments, read_zip

CORE_TEST = frozenset(
    """mdab0 mwbt0 felc0 mtas1 mwew0 fpas0 mjmp0 mlnt0 fpkt0 mlll0 mtls0 fjlm0
    mbpm0 mklt0 fnlp0 mcmj0 mjdh0 fmgd0 mgrt0 mnjm0 fdhc0 mjln0 mpam0 fmld0""".split()
)
DEV = frozenset(
    """faks0 fdac1 fjem0 mgwt0 mjar0 mmdb1 mmdm2 mpdf0 fcmh0 fkms0 mbdg0 mbwm0 mcsh0 fadg0 fdms0 fedw0 mgjf0
    mglb0 mrtk0 mtaa0 mtdt0 mthc0 mwjg0 fnmr0 frew0 fsem0 mbns0 mmjr0 mdls0 mdlf0 mdvc0 mers0 fmah0 fdrw0
    mrcs0 mrjm4 fcal1 mmwh0 fjsj0 majc0 mjsw0 mreb0 fgjd0 fjmg0 mroa0 mteb0 mjfc0 mrjr0 fmml0 mrws1""".split()
)
SAMPLE_TEST = ("dr2-faem0", "dr8-mbcg0")
SAMPLE_DEV = ("dr3-falk0", "dr6-mbma1")

RATE = 16_000
_SHARED = re.compile(r"sa[12]$")
_FILE_LIMIT = 4 << 20
_SAMPLE = "timit_sample/timit_sample.zip"

WHOLE = Info(
    name="timit",
    source="TIMIT Acoustic-Phonetic Continuous Speech Corpus, LDC93S1",
    licence="LDC, not free",
    classes=0,
    shape=(),
)
FREE = Info(
    name="timit_sample",
    source="sample of TIMIT distributed with NLTK: 14 speakers, 140 sentences",
    licence="CC BY-NC-SA, (c) 1993 Linguistic Data Consortium; non-commercial",
    classes=0,
    shape=(),
    stand_in=True,
    note="stands in for TIMIT; error rates on it are not comparable with those on the 630 speakers",
)


def load(split: str, data_dir: str | os.PathLike[str] | None, trained: int, sa: bool) -> Corpus:
    """The whole corpus.

    Args:
      split: "train", "dev" or "test".
      data_dir: folder that holds `timit/`, or None to search `$COMPRESSX_DATA`.
      trained: phones the network is trained on: 39, 48 or 61.
      sa: whether training keeps sa1 and sa2.

    Raises:
      DataNotFoundError, DataFileError: names the folder or the file.
    """
    folder = _folder(data_dir) / ""
    wanted = {"train": None, "dev": DEV, "test": CORE_TEST}[split]
    part = _child(folder, "train" if split == "train" else "test")
    utterances = []
    for sound in sorted(p for p in part.rglob("*") if p.suffix.lower() == ".wav" and p.is_file()):
        speaker, sentence = sound.parent.name.lower(), sound.stem.lower()
        if (wanted is not None and speaker not in wanted) or (_SHARED.match(sentence) and not (sa and wanted is None)):
            continue
        labels = next((q for q in sound.parent.iterdir() if q.name.lower() == f"{sentence}.phn"), None)
        if labels is None:
            raise DataNotFoundError(f"{sound} has no .phn file beside it; the layout is in {GUIDE}")
        utterances.append(_utterance(f"{speaker}/{sentence}", speaker, _read(sound), _read(labels)))
    if not utterances:
        raise DataNotFoundError(f"{part}: no recordings of the {split} speakers below it; the layout is in {GUIDE}")
    return _corpus(utterances, WHOLE, trained)


def load_sample(
    split: str, data_dir: str | os.PathLike[str] | None, trained: int, sa: bool, test: Sequence[str], dev: Sequence[str]
) -> Corpus:
    """The free sample, split by speaker: `test` and `dev` as given or as suggested, all others for training.

    Raises:
      DataNotFoundError, DataFileError, ValueError: names the file or the speaker.
    """
    path = find_file(_SAMPLE, data_dir)
    files = read_zip(Blob(path, path.read_bytes()), 64 << 20)
    test = tuple(test) or SAMPLE_TEST
    dev = tuple(dev) or tuple(s for s in SAMPLE_DEV if s not in test)
    speakers = {name.split("/")[0] for name in files}
    for who in (*test, *dev):
        if who not in speakers:
            raise ValueError(f"timit_sample has no speaker {who!r}; it has {', '.join(sorted(speakers))}")
    if set(test) & set(dev):
        raise ValueError(f"{', '.join(sorted(set(test) & set(dev)))}: a speaker cannot be in test and in dev")
    utterances = []
    for name in sorted(n for n in files if n.endswith(".wav")):
        speaker, sentence = PurePosixPath(name).parts[-2:] if "/" in name else ("", "")
        sentence = sentence.removesuffix(".wav")
        home = "test" if speaker in test else "dev" if speaker in dev else "train"
        if home != split or (_SHARED.match(sentence) and not (sa and split == "train")):
            continue
        labels = f"{name.removesuffix('.wav')}.phn"
        if labels not in files:
            raise DataFileError(f"{path}: {name} has no {labels}")
        blobs = (Blob(Path(f"{path}/{n}"), files[n]) for n in (name, labels))
        utterances.append(_utterance(f"{speaker}/{sentence}", speaker, *blobs))
    return _corpus(utterances, FREE, trained)


def _utterance(name: str, speaker: str, sound: Blob, labels: Blob) -> Utterance:
    heard = audio.read(sound)
    if heard.rate != RATE:
        raise DataFileError(f"{sound.path}: {heard.rate} samples a second; TIMIT has {RATE}")
    segments = read_segments(labels, len(heard.samples))
    for _, _, phone in segments:
        if phone not in phones.TO_48:
            raise DataFileError(f"{labels.path}: {phone!r:.40} is none of TIMIT's 61 phones")
    return Utterance(name, speaker, heard.samples, tuple(p for _, _, p in segments), segments)


def _corpus(utterances: list[Utterance], info: Info, trained: int) -> Corpus:
    inventory = phones.timit(trained)
    named = replace(info, classes=len(inventory.names), class_names=inventory.names)
    return Corpus(tuple(utterances), RATE, inventory, "phone", named)


def _folder(data_dir: str | os.PathLike[str] | None) -> Path:
    places = search_places(data_dir)
    for place in places:
        for found in _named(place, "timit"):
            return found
    looked = ", ".join(map(str, places)) or "nowhere, for neither data_dir nor $COMPRESSX_DATA is set"
    raise DataNotFoundError(
        f"data set 'timit' not found: no folder timit/ with train/ and test/ in it. Looked in: {looked}. "
        f"It is sold by the LDC (LDC93S1); layout: {GUIDE}"
    )


def _child(folder: Path, name: str) -> Path:
    for found in _named(folder, name):
        return found
    raise DataNotFoundError(f"{folder}: no folder {name}/ in it; the layout is in {GUIDE}")


def _named(folder: Path, name: str) -> Iterator[Path]:
    yield from sorted(p for p in folder.iterdir() if p.name.lower() == name and p.is_dir())


def _read(path: Path) -> Blob:
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_LIMIT + 1)
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(data) > _FILE_LIMIT:
        raise DataFileError(f"{path}: larger than the {_FILE_LIMIT} bytes that a TIMIT file can have")
    return Blob(path, data)
