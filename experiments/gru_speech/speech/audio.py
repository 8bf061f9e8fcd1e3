"""Audio files as 16-bit samples: RIFF WAV and NIST SPHERE, both read as hostile: bounded, checked, nothing executed."""

from __future__ import annotations

import io
import re
import wave
from typing import NamedTuple

import numpy as np

from experiments.common.data import Blob, DataFileError

MAX_SECONDS = 600  # of one file
_RATES = range(4_000, 192_001)
_SPHERE_MAGIC = b"NIST_1A\n"


class Audio(NamedTuple):
    """One channel of sound: int16 samples `[n]`, and samples a second."""

    samples: np.ndarray
    rate: int


def read(blob: Blob) -> Audio:
    """A WAV or SPHERE file by its first bytes (TIMIT calls its SPHERE files .WAV).

    Raises:
      DataFileError: neither, damaged, or of a kind that is not read; begins with the file.
    """
    if blob.data[:8] == _SPHERE_MAGIC:
        return sphere(blob)
    if blob.data[:4] == b"RIFF":
        return wav(blob)
    raise DataFileError(f"{blob.path}: begins with {blob.data[:8].hex()}, which is neither RIFF WAV nor NIST SPHERE")


def wav(blob: Blob) -> Audio:
    """A RIFF WAV file of 16-bit PCM, one channel.

    Raises:
      DataFileError: damaged, truncated, or another coding; begins with the file.
    """
    try:
        with wave.open(io.BytesIO(blob.data)) as file:
            channels, width, rate, count = file.getparams()[:4]
            _check(blob, channels, width, rate, count)
            data = file.readframes(count)
    except DataFileError:
        raise
    except (wave.Error, EOFError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise DataFileError(
            f"{blob.path}: not a sound WAV file ({str(error) or type(error).__name__}); fetch it again"
        ) from error
    if len(data) != 2 * count:
        raise DataFileError(f"{blob.path}: holds {len(data)} bytes of sound, its header states {2 * count}")
    return Audio(np.frombuffer(data, "<i2").astype(np.int16), rate)


def sphere(blob: Blob) -> Audio:
    """A NIST SPHERE file of 16-bit PCM, one channel, either byte order.

    The header is text: `NIST_1A`, its own size, lines `name -type value`, `end_head`. Files compressed inside (shorten)
    and other codings are refused by name.

    Raises:
      DataFileError: damaged, truncated, or another coding; begins with the file.
    """
    data = blob.data
    if data[:8] != _SPHERE_MAGIC:
        raise DataFileError(f"{blob.path}: begins with {data[:8].hex()}, not with NIST_1A")
    size_text = data[8:16].strip()
    if not size_text.isdigit() or not 32 <= int(size_text) <= 65_536 or int(size_text) > len(data):
        raise DataFileError(f"{blob.path}: states a header of {size_text!r:.40} bytes, in a file of {len(data)}")
    fields = _sphere_fields(blob, data[16 : int(size_text)])

    def number(name: str, default: int | None = None) -> int:
        value = fields.get(name, default)
        if not isinstance(value, int):
            raise DataFileError(f"{blob.path}: the header's {name} is {value!r}; a whole number is needed")
        return value

    coding = fields.get("sample_coding", "pcm")
    if coding != "pcm":
        raise DataFileError(
            f"{blob.path}: sample_coding is {coding!r:.60}; only 16-bit pcm is read (sph2pipe converts the others)"
        )
    order = fields.get("sample_byte_format", "01")
    if order not in ("01", "10"):
        raise DataFileError(f"{blob.path}: sample_byte_format is {order!r:.20}; it must be 01 or 10")
    count, rate = number("sample_count"), number("sample_rate")
    _check(blob, number("channel_count", 1), number("sample_n_bytes", 2), rate, count)
    body = data[int(size_text) :]
    if len(body) < 2 * count:
        raise DataFileError(f"{blob.path}: holds {len(body)} bytes of sound, its header states {2 * count}")
    return Audio(np.frombuffer(body, "<i2" if order == "01" else ">i2", count).astype(np.int16), rate)


def _sphere_fields(blob: Blob, header: bytes) -> dict[str, int | str]:
    fields: dict[str, int | str] = {}
    for line in header.split(b"\n"):
        text = line.decode("ascii", "replace").strip()
        if text == "end_head":
            return fields
        parts = text.split(None, 2)
        if not text or text.startswith(";"):
            continue
        if len(parts) != 3 or parts[1][:2] not in ("-i", "-r", "-s"):
            raise DataFileError(f"{blob.path}: the header line {text!r:.60} is not `name -type value`")
        name, kind, value = parts
        if kind == "-i":
            if not re.fullmatch(r"-?[0-9]{1,12}", value):
                raise DataFileError(f"{blob.path}: the header's {name:.40} is {value!r:.40}; a whole number is needed")
            fields[name] = int(value)
        else:
            fields[name] = value
    raise DataFileError(f"{blob.path}: the header has no end_head")


def _check(blob: Blob, channels: int, width: int, rate: int, count: int) -> None:
    if channels != 1 or width != 2:
        raise DataFileError(f"{blob.path}: {channels} channels of {8 * width} bits; one of 16 bits is needed")
    if rate not in _RATES:
        raise DataFileError(f"{blob.path}: states {rate} samples a second")
    if not 1 <= count <= MAX_SECONDS * rate:
        raise DataFileError(f"{blob.path}: states {count} samples; 1 to {MAX_SECONDS} seconds of {rate} are read")


def encode_sphere(audio: Audio, order: str = "01") -> bytes:
    """The bytes of a SPHERE file, as TIMIT's are written; `sphere` reads them back exactly."""
    lines = [
        f"channel_count -i 1\nsample_count -i {len(audio.samples)}\nsample_rate -i {audio.rate}",
        f"sample_n_bytes -i 2\nsample_byte_format -s2 {order}\nsample_sig_bits -i 16\nend_head\n",
    ]
    header = b"NIST_1A\n   1024\n" + "\n".join(lines).encode()
    return header.ljust(1024) + audio.samples.astype("<i2" if order == "01" else ">i2").tobytes()


def encode_wav(audio: Audio) -> bytes:
    """The bytes of a WAV file; `wav` reads them back exactly."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(audio.rate)
        file.writeframes(audio.samples.astype("<i2").tobytes())
    return stream.getvalue()
