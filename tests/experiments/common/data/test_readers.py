"""File formats: what is right is read exactly; what is not is one error that names the file."""

import contextlib
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.common.data import readers
from experiments.common.data.cifar10_subset import encode
from experiments.common.data.source import Blob, DataFileError

PATH = Path("folder/the-file")
IMAGES = np.random.default_rng(0).integers(0, 255, (3, 4, 5), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 255, (3, 6, 5, 2), dtype=np.uint8)


def blob(data: bytes) -> Blob:
    return Blob(PATH, data)


def idx_bytes(array: np.ndarray, magic: bytes = b"\0\0\x08") -> bytes:
    return magic + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def npz_bytes(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, allow_pickle=True, **arrays)
    return stream.getvalue()


def tar_bytes(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def test_idx_is_read_exactly() -> None:
    out = readers.idx(blob(gzip.compress(idx_bytes(IMAGES))), (3, 4, 5))
    assert np.array_equal(out, IMAGES) and out.dtype == np.uint8


def test_gzip_of_several_members_is_one_file() -> None:
    raw = idx_bytes(IMAGES)
    assert np.array_equal(readers.idx(blob(gzip.compress(raw[:20]) + gzip.compress(raw[20:])), (3, 4, 5)), IMAGES)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "begins with"),
        (b"plain text", "not a sound gzip"),
        (gzip.compress(idx_bytes(IMAGES))[:-9], "not a sound gzip"),
        (gzip.compress(idx_bytes(IMAGES, b"\0\0\x0d")), "begins with 00000d03, not with the idx magic 00000803"),
        (gzip.compress(idx_bytes(IMAGES[0])), "begins with 00000802"),
        (gzip.compress(b"\0\0\x08\x03\0\0"), "ends inside its header"),
        (gzip.compress(idx_bytes(IMAGES[:2])), r"states the shape \[2, 4, 5\], expected \[3, 4, 5\]"),
        (gzip.compress(idx_bytes(IMAGES)[:-1]), "holds 59 values, its header states 60"),
        (gzip.compress(idx_bytes(IMAGES) + b"x"), "unpacks to more than the 76 bytes"),
        (gzip.compress(bytes(10**7)), "unpacks to more than the 76 bytes"),
    ],
)
def test_bad_idx_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(DataFileError, match=f"^{PATH}.*{message}"):
        readers.idx(blob(data), (3, 4, 5))


def test_delta_images_are_the_inverse_of_encode() -> None:
    out = readers.delta_images(blob(encode(COLOUR)), (3, 2, 6, 5))
    assert np.array_equal(out, COLOUR) and out.dtype == np.uint8


def test_delta_images_against_a_loop() -> None:
    deltas = np.random.default_rng(2).integers(0, 255, (2, 1, 3, 4), dtype=np.uint8)
    out = readers.delta_images(blob(lzma.compress(deltas.tobytes())), (2, 1, 3, 4))
    for n, c, h in np.ndindex(2, 1, 3):
        value = 0
        for w in range(4):
            value = (value + int(deltas[n, c, h, w])) % 256
            assert out[n, h, w, c] == value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated"),
        (b"a plain text, not xz", "not a sound xz"),
        (encode(COLOUR)[:-5], "truncated"),
        (encode(COLOUR[:2]), "unpacks to 120 bytes, expected 180"),
        (lzma.compress(bytes(10**7)), "more than the 180 bytes"),
        (encode(COLOUR) + encode(COLOUR), "more than the 180 bytes"),
        (lzma.compress(bytes(180), format=lzma.FORMAT_ALONE), "not a sound xz"),
    ],
)
def test_bad_xz_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(DataFileError, match=f"^{PATH}.*{message}"):
        readers.delta_images(blob(data), (3, 2, 6, 5))


def test_an_xz_file_cannot_ask_for_much_memory() -> None:
    body = lzma.compress(bytes(180), filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 16}])
    # The byte that states the dictionary of the first block; 36 stands for 1 GiB (xz format, 5.3.1).
    at = body.index(bytes([0x21, 0x01])) + 2
    header_end = 12 + (body[12] + 1) * 4
    header = bytearray(body[12 : header_end - 4])
    header[at - 12] = 36
    hostile = body[:12] + bytes(header) + struct.pack("<I", zlib.crc32(header)) + body[header_end:]
    with pytest.raises(DataFileError, match="[Mm]emory"):
        readers.unxz(blob(hostile), 180)


def test_labels() -> None:
    out = readers.class_labels(blob(b""), readers.raw_labels(blob(b"\x00\x09\x05"), 3), 10)
    assert out.tolist() == [0, 9, 5] and out.dtype == np.int32
    with pytest.raises(DataFileError, match="holds 3 labels, expected 4"):
        readers.raw_labels(blob(b"\x00\x09\x05"), 4)
    with pytest.raises(DataFileError, match="label 9 at row 1, expected 0 to 8"):
        readers.class_labels(blob(b""), np.array([0, 9, 5], np.uint8), 9)


def test_npz_is_read_as_numpy_reads_it() -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b/c": np.asfortranarray(np.arange(12).reshape(3, 4)),
        "scalar": np.float64(2.5),
        "empty": np.zeros((0, 3), np.int8),
        "text": np.array(["x", "yz"]),
        "big": np.arange(3, dtype=">i4"),
    }
    out = readers.npz(blob(npz_bytes(**arrays)), 1 << 20)
    assert set(out) == set(arrays)
    for name, array in arrays.items():
        assert np.array_equal(out[name], array) and out[name].dtype == np.asarray(array).dtype


class Trap:
    """Leaves a mark when it is unpickled."""

    sprung = False

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str, bool]]:
        return _spring, ("sprung", True)


def _spring(name: str, value: bool) -> None:
    setattr(Trap, name, value)


def test_pickles_are_never_loaded() -> None:
    data = npz_bytes(w=np.array([Trap()], dtype=object))
    with np.load(io.BytesIO(data), allow_pickle=True) as archive:  # the trap works
        _ = archive["w"]
    assert Trap.sprung
    Trap.sprung = False
    with pytest.raises(DataFileError, match="entry 'w' holds object"):
        readers.npz(blob(data), 1 << 20)
    assert not Trap.sprung


def zip_of(*entries: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_bad_npz_is_refused() -> None:
    good = npy(np.arange(4, dtype=np.int32))
    huge = good.replace(b"'shape': (4,), }        ", b"'shape': (4" + b"0" * 8 + b",), }")
    assert len(huge) == len(good)
    negative = good.replace(b"(4,), } ", b"(-4,), }")
    for data, message in [
        (b"PK\x03\x04 nothing", "not a sound .npz"),
        (zip_of(("w.npy", good))[:-30], "not a sound .npz"),
        (zip_of(("w.npy", b"text")), "entry 'w' is not a NumPy array"),
        (zip_of(("w.npy", good[:-1])), r"entry 'w' holds 15 bytes, its header states \[4\]"),
        (zip_of(("w.npy", huge)), "entry 'w' holds 16 bytes"),
        (zip_of(("w.npy", negative)), "entry 'w' holds 16 bytes"),
        (zip_of(("w.npy", bytes(1 << 21))), "more than the 1048576 bytes"),
        (zip_of(("w.npy", good), ("w", good)), "'w' occurs twice"),
        (zip_of(("w.npy", npy(np.zeros(2, [("a", "i4")])))), "not plain numbers"),
    ]:
        with pytest.raises(DataFileError, match=f"^{PATH}.*{message}"):
            readers.npz(blob(data), 1 << 20)


def test_tar_members_are_read_by_name() -> None:
    members = {"d/a": b"12345", "d/other": b"x" * 100, "d/b": b"123"}
    assert readers.tar_gz(blob(tar_bytes(members)), {"d/b": 3, "d/a": 5}, 1 << 20) == {"d/a": b"12345", "d/b": b"123"}


def test_bad_tar_is_refused() -> None:
    link = io.BytesIO()
    with tarfile.open(fileobj=link, mode="w:gz") as archive:
        info = tarfile.TarInfo("d/a")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    for data, message in [
        (tar_bytes({"d/b": b"1"}), r"lacks d/a \(5 bytes\)"),
        (tar_bytes({"d/a": b"1234"}), r"lacks d/a \(5 bytes\)"),
        (link.getvalue(), "lacks d/a"),
        (gzip.compress(b"no tar" * 200), "not a sound tar"),
        (tar_bytes({"d/a": b"12345", "bomb": bytes(2 << 20)}), "more than the 1048576 bytes"),
    ]:
        with pytest.raises(DataFileError, match=f"^{PATH}.*{message}"):
            readers.tar_gz(blob(data), {"d/a": 5}, 1 << 20)


SOUND = {
    "idx": (gzip.compress(idx_bytes(IMAGES)), lambda b: readers.idx(b, (3, 4, 5))),
    "xz": (encode(COLOUR), lambda b: readers.delta_images(b, (3, 2, 6, 5))),
    "npz": (npz_bytes(a=IMAGES, b=COLOUR), lambda b: readers.npz(b, 1 << 16)),
    "tar": (tar_bytes({"d/a": b"12345"}), lambda b: readers.tar_gz(b, {"d/a": 5}, 1 << 16)),
    "tar_inside": (
        gzip.decompress(tar_bytes({"d/a": b"12345"})),
        lambda b: readers.tar_gz(Blob(PATH, gzip.compress(b.data, 1)), {"d/a": 5}, 1 << 16),
    ),
}


@pytest.mark.parametrize("kind", SOUND)
@settings(max_examples=150)
@given(data=st.data())
def test_damage_raises_nothing_but_a_data_file_error(kind: str, data: st.DataObject) -> None:
    sound, read = SOUND[kind]
    damaged = bytearray(sound[: data.draw(st.integers(0, len(sound)))] if data.draw(st.booleans()) else sound)
    for _ in range(data.draw(st.integers(0, 3)) if damaged else 0):
        damaged[data.draw(st.integers(0, min(len(damaged), 600) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DataFileError):  # some damage changes nothing that matters, such as a time stamp
        read(blob(bytes(damaged)))
