"""WAV and SPHERE files: exact round trips, and everything damaged refused with one clear error."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.common.data import Blob, DataFileError
from experiments.gru_speech.speech import audio

SOUND = audio.Audio(np.arange(-700, 700, dtype=np.int16) * 40, 16_000)


def _blob(data: bytes) -> Blob:
    return Blob(Path("x.wav"), data)


@pytest.mark.parametrize("order", ["01", "10"])
def test_sphere_comes_back(order) -> None:
    back = audio.read(_blob(audio.encode_sphere(SOUND, order)))
    np.testing.assert_array_equal(back.samples, SOUND.samples)
    assert back.rate == 16_000
    assert back.samples.dtype == np.int16


def test_wav_comes_back() -> None:
    back = audio.read(_blob(audio.encode_wav(SOUND)))
    np.testing.assert_array_equal(back.samples, SOUND.samples)


def test_a_sphere_header_as_timit_writes_it() -> None:
    header = (
        b"NIST_1A\n   1024\ndatabase_id -s5 TIMIT\ndatabase_version -s3 1.0\nutterance_id -s8 cjf0_sa1\n"
        b"channel_count -i 1\nsample_count -i 4\nsample_rate -i 16000\nsample_min -i -2191\nsample_max -i 2790\n"
        b"sample_n_bytes -i 2\nsample_byte_format -s2 01\nsample_sig_bits -i 16\nend_head\n"
    )
    with pytest.raises(DataFileError, match="sample_min"):
        audio.read(_blob(header.replace(b"-i -2191", b"-i x").ljust(1024) + b"\0" * 8))
    back = audio.read(_blob(header.ljust(1024) + np.array([1, -2, 3, -4], "<i2").tobytes()))
    assert back.samples.tolist() == [1, -2, 3, -4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b[:500], "states a header of"),
        (lambda b: b.replace(b"   1024", b" 999999"), "states a header of"),
        (lambda b: b[:-2], "its header states"),
        (lambda b: b.replace(b"end_head", b"end_haed"), "not `name -type value`|no end_head"),
        (lambda b: b.replace(b"sample_count -i 1400", b"sample_count -i 9999999999"), "states 9999999999 samples"),
        (lambda b: b.replace(b"sample_count -i 1400", b"sample_count -i -5"), "states -5 samples"),
        (lambda b: b.replace(b"channel_count -i 1", b"channel_count -i 2"), "2 channels"),
        (lambda b: b.replace(b"sample_byte_format -s2 01", b"sample_byte_format -s2 77"), "must be 01 or 10"),
        (lambda b: b.replace(b"sample_sig_bits -i 16", b"sample_coding -s7 shorten"), "sph2pipe"),
        (lambda b: b.replace(b"sample_rate -i 16000", b"sample_rate -i 1"), "1 samples a second"),
        (lambda b: b"XIST" + b[4:], "neither RIFF WAV nor NIST SPHERE"),
    ],
)
def test_a_damaged_sphere_file_is_refused(change, words) -> None:
    with pytest.raises(DataFileError, match=words):
        audio.read(_blob(change(audio.encode_sphere(SOUND))))


@given(st.binary(max_size=200), st.sampled_from([b"NIST_1A\n   1024\n", b"RIFF", b""]), st.integers(0, 1500))
def test_no_bytes_do_harm(noise, head, at) -> None:
    whole = audio.encode_sphere(SOUND) if head.startswith(b"N") else audio.encode_wav(SOUND)
    for data in (head + noise, whole[:at] + noise + whole[at + len(noise) :], whole[:at]):
        try:
            back = audio.read(_blob(data))
        except DataFileError:
            continue
        assert back.samples.dtype == np.int16
        assert len(back.samples) <= audio.MAX_SECONDS * back.rate
