"""Where files are looked for, and what is said when they are not there."""

import functools
import hashlib
import http.server
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from experiments.common import data
from experiments.common.data.dataset import Arrays

INFO = data.Info(name="tiny", source="test", licence="none", classes=256, shape=(1,))
CONTENT = bytes(range(10))
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def read(split: str, blobs: Sequence[data.Blob]) -> Arrays:
    values = np.frombuffer(blobs[0].data, np.uint8)
    return {"inputs": values[:, None], "labels": values.astype(np.int32)}


def tiny(url: str = "", sha256: str = "") -> data.Source:
    files = (data.File("tiny/a.bin", 100, url, sha256),)
    return data.Source(INFO, {"train": files}, read, obtain="from the author")


def put(folder: Path, content: bytes = CONTENT) -> Path:
    path = folder / "tiny" / "a.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serves tmp_path/www on localhost."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    (tmp_path / "www").mkdir()
    handler = functools.partial(Quiet, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_data_dir_comes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = put(tmp_path / "1", b"\1"), put(tmp_path / "2", b"\2")
    assert data.search_places() == []
    monkeypatch.setenv("COMPRESSX_DATA", str(second))
    assert data.search_places(first) == [first, second]
    assert data.load_source(tiny(), "train").labels.tolist() == [2]
    assert data.load_source(tiny(), "train", first).labels.tolist() == [1]
    assert data.find_file("tiny/a.bin") == second / "tiny/a.bin"
    assert data.find_file("tiny/a.bin", str(first)) == first / "tiny/a.bin"


def test_what_data_dir_lacks_is_found_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "1").mkdir()
    monkeypatch.setenv("COMPRESSX_DATA", str(put(tmp_path / "2")))
    assert len(data.load_source(tiny(), "train", tmp_path / "1")) == 10
    assert data.find_file("tiny/a.bin", tmp_path / "1") == tmp_path / "2/tiny/a.bin"


def test_files_of_two_folders_are_never_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = (data.File("x", 9), data.File("y", 9))
    source = data.Source(INFO, {"train": files}, read)
    for folder, names in (("1", "x"), ("2", "y"), ("3", "xy")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(folder.encode())
    monkeypatch.setenv("COMPRESSX_DATA", str(tmp_path / "2"))
    with pytest.raises(data.DataNotFoundError, match=r"1 \(lacks y\); .*2 \(lacks x\)"):
        data.load_source(source, "train", tmp_path / "1")
    monkeypatch.setenv("COMPRESSX_DATA", str(tmp_path / "3"))
    assert data.load_source(source, "train", tmp_path / "1").labels.tolist() == [ord("3")]


def test_the_error_says_what_where_and_whence(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(data.DataNotFoundError) as caught:
        data.load_source(tiny(), "train", tmp_path)
    message = str(caught.value)
    for part in ("'tiny'", "tiny/a.bin", str(tmp_path), str(cache), "from the author", "docs/data.md"):
        assert part in message
    with pytest.raises(data.DataNotFoundError, match=r"checkpoints/r\.npz not found.*neither data_dir nor"):
        data.find_file("checkpoints/r.npz")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "cifar10_subset"])
def test_every_set_of_files_says_where_to_get_it(name: str) -> None:
    source = data.DATASETS[name]
    with pytest.raises(data.DataNotFoundError) as caught:
        data.load(name, "train", download=False)
    assert source.obtain and source.obtain in str(caught.value)
    assert all(file.path in str(caught.value) for file in source.splits["train"])


def test_a_misspelt_folder_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(data.DataNotFoundError, match=r"data_dir: there is no folder '.*/nowhere'"):
        data.load_source(tiny(), "train", tmp_path / "nowhere")
    monkeypatch.setenv("COMPRESSX_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(data.DataNotFoundError, match=r"\$COMPRESSX_DATA: there is no folder"):
        data.find_file("a")


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    put(tmp_path / "1", bytes(101))
    with pytest.raises(data.DataFileError, match=r"a\.bin: larger than the 100 bytes"):
        data.load_source(tiny(), "train", tmp_path / "1")


def test_a_download_is_kept_in_the_layout(server: str, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "www/a.bin").write_bytes(CONTENT)
    source = tiny(f"{server}/a.bin", SHA256)
    with pytest.raises(data.DataNotFoundError, match="A download was not wanted"):
        data.load_source(source, "train", download=False)
    assert data.load_source(source, "train").labels.tolist() == list(range(10))
    downloads = cache / "data/downloads"
    assert [path.name for path in downloads.iterdir()] == ["tiny"]
    (tmp_path / "www/a.bin").unlink()
    assert len(data.load_source(source, "train", download=False)) == 10


def test_a_download_with_the_wrong_content_is_not_kept(server: str, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "www/a.bin").write_bytes(CONTENT + b"x")
    with pytest.raises(data.DataNotFoundError, match=f"has the sha256 .* expected {SHA256}"):
        data.load_source(tiny(f"{server}/a.bin", SHA256), "train")
    assert not [path for path in (cache / "data/downloads").rglob("*") if path.is_file()]


def test_a_missing_download_is_reported(server: str) -> None:
    with pytest.raises(data.DataNotFoundError, match=r"The download failed \(.*404.*from the author"):
        data.load_source(tiny(f"{server}/a.bin", SHA256), "train")


def test_without_a_network_the_error_comes_at_once() -> None:
    with socket.socket() as unused:  # bound and not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a.bin"
        with pytest.raises(data.DataNotFoundError, match=r"The download failed \(ConnectionRefusedError"):
            data.load_source(tiny(url, SHA256), "train")
