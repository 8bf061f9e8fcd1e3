"""How a data set is described and its files found: in `data_dir`, in `$COMPRESSX_DATA`, or by a tfds download."""

from __future__ import annotations

import hashlib
import os
import socket
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from compressx.cache import UNFINISHED, cache_folder
from experiments.common.data.dataset import Arrays, Info

GUIDE = "docs/data.md"


class DataNotFoundError(FileNotFoundError):
    """Data are missing; the message names the files, the folders looked in and where to get them."""


class DataFileError(ValueError):
    """A data file is damaged or is not what its name says; the message begins with the file."""


@dataclass(frozen=True)
class File:
    """One file of a data set.

    Attributes:
      path: relative to the data folder, with forward slashes.
      limit: bytes above which the file is refused unread.
      url: where tfds can download it; empty where it cannot.
      sha256: of the published file; checked after a download only, since another gzip wrapper of the same content
        is as good.
    """

    path: str
    limit: int
    url: str = ""
    sha256: str = ""


class Blob(NamedTuple):
    """A file's bytes, with its path for error messages."""

    path: Path
    data: bytes


@dataclass(frozen=True)
class Source:
    """A data set: the files of each split and the pure function that reads them.

    Attributes:
      info: facts about the set.
      splits: files of each split; no files means that nothing has to be found and nothing is cached.
      read: `(split, blobs in the order of the files) -> arrays` named as `dataset.from_arrays` wants them.
      obtain: one line that says where to get the files.
      version: raised when `read` changes, so that caches made by the old one are not used.
    """

    info: Info
    splits: Mapping[str, tuple[File, ...]]
    read: Callable[[str, Sequence[Blob]], Arrays]
    obtain: str = ""
    version: int = 1


def cache_dir() -> Path:
    """Returns the folder for prepared data and downloads, `data` in the cache folder; see `compressx.cache`."""
    return cache_folder("data")


def search_places(data_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """Returns the folders searched, in order: `data_dir`, then `$COMPRESSX_DATA`; those not given are left out.

    Raises:
      DataNotFoundError: a given folder does not exist (a misspelt one would otherwise be passed over in silence).
    """
    places = []
    for title, value in (("data_dir", data_dir), ("$COMPRESSX_DATA", os.environ.get("COMPRESSX_DATA"))):
        if value is None or value == "":
            continue
        folder = Path(value).expanduser()
        if not folder.is_dir():
            raise DataNotFoundError(f"{title}: there is no folder {str(folder)!r}; correct it or leave it unset")
        places.append(folder)
    return places


def find_file(relpath: str, data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Finds one file, such as `checkpoints/resnet20_cifar10.npz`, in `data_dir` or `$COMPRESSX_DATA`.

    Args:
      relpath: path relative to the data folder.
      data_dir: folder searched before `$COMPRESSX_DATA`.

    Returns:
      The path of the first that exists.

    Raises:
      DataNotFoundError: no such file; the message lists the folders.
    """
    places = search_places(data_dir)
    for place in places:
        if (place / relpath).is_file():
            return place / relpath
    raise DataNotFoundError(_not_found(relpath, [relpath], places, f"how to obtain it: {GUIDE}"))


def find_files(source: Source, split: str, data_dir: str | os.PathLike[str] | None, download: bool) -> list[Path]:
    """Finds all files of a split in one folder, or downloads them; raises `DataNotFoundError`."""
    files = source.splits[split]
    names = [file.path for file in files]
    downloads = cache_dir() / "downloads"  # in the same layout
    places = [*search_places(data_dir), downloads]
    for place in places:
        if all((place / name).is_file() for name in names):
            return [place / name for name in names]
    reason = "there is no download of it"
    cause: Exception | None = None
    if all(file.url for file in files):
        reason = "a download was not wanted"
        if download:
            try:
                return _download(files, downloads)
            except Exception as error:  # whatever the network, the disk or tfds raises: the files are not there
                reason = f"the download failed ({type(error).__name__}: {error})"
                cause = error
    advice = f"{reason}; put it in data_dir or $COMPRESSX_DATA; how to obtain it: {source.obtain} ({GUIDE})"
    raise DataNotFoundError(_not_found(f"data set {source.info.name!r}", names, places, advice)) from cause


def read_blobs(files: Sequence[File], paths: Sequence[Path]) -> list[Blob]:
    """Reads the files, refusing those above their limit; raises `DataFileError` naming the file."""
    blobs = []
    for file, path in zip(files, paths, strict=True):
        try:
            with path.open("rb") as handle:
                data = handle.read(file.limit + 1)
        except OSError as error:
            raise DataFileError(f"{path}: cannot be read ({error.strerror or error})") from error
        if len(data) > file.limit:
            raise DataFileError(f"{path}: larger than the {file.limit} bytes that {file.path} can have")
        blobs.append(Blob(path, data))
    return blobs


def _not_found(what: str, files: Sequence[str], places: Sequence[Path], advice: str) -> str:
    where = []
    for place in places:
        missing = [file for file in files if not (place / file).is_file()]
        where.append(f"{place} (lacks {', '.join(missing)})")
    looked = "; ".join(where) or "nowhere, for neither data_dir nor $COMPRESSX_DATA is set"
    return f"{what} not found. Files: {', '.join(files)}. Looked in: {looked}. {advice[0].upper()}{advice[1:]}"


def _download(files: Sequence[File], folder: Path) -> list[Path]:
    """Downloads by tfds, checks and only then moves the files to where they belong under `folder`."""
    for file in files:
        _reach(file.url)
    import tensorflow_datasets as tfds  # half a second, and needed here only

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder) as unfinished:
        found = tfds.download.DownloadManager(download_dir=unfinished).download({f.path: f.url for f in files})
        for file in files:
            with open(found[file.path], "rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
            if digest != file.sha256:
                raise DataFileError(f"{file.url} has the sha256 {digest}, expected {file.sha256}")
        for file in files:
            (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(found[file.path], folder / file.path)
    return [folder / file.path for file in files]


def _reach(url: str) -> None:
    """Raises `OSError` immediately where there is no network; tfds would retry for more than three minutes."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return  # the proxy may reach what this machine cannot
    socket.create_connection((host, parts.port or (443 if parts.scheme == "https" else 80)), timeout=10).close()
