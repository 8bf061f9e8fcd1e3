"""The folder that compressx keeps between processes, and files in it that are whole and nobody else's.

One rule for everything: `$COMPRESSX_CACHE` where it is set, else `$XDG_CACHE_HOME/compressx`, else
`~/.cache/compressx`; in it `native` (compiled libraries), `tuning` (plans of kernels) and `data` (decoded data sets
and downloads). Each of the three may be deleted at any time.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

UNFINISHED = ".unfinished-"  # how the name of a file or folder begins that is being made
_LOCK = ".lock"
_ABANDONED = 3600  # seconds after which what is unfinished belongs to a process that was killed, whoever made it
_LARGEST = 1 << 28  # bytes of a sealed file


def cache_folder(part: str = "") -> Path:
    """The cache folder, or one of its parts; nothing is made. A variable that is empty counts as unset.

    Raises:
      FileNotFoundError: no variable is set and the user has no home folder.
    """
    own, common = os.environ.get("COMPRESSX_CACHE"), os.environ.get("XDG_CACHE_HOME")
    given = own or os.path.join(common or os.path.join("~", ".cache"), "compressx")
    root = os.path.expanduser(given)
    if root.startswith("~"):  # no such user, or a user without a home: this would make a folder named '~' where we are
        raise FileNotFoundError(errno.ENOENT, "there is no home folder; set $COMPRESSX_CACHE to a folder", given)
    return Path(root) / part


# --- Whose a file is


def distrust(info: os.stat_result) -> str | None:
    """Why a file or folder may be another user's work; None where only this user and root can write it."""
    if info.st_uid not in (os.geteuid(), 0):
        return f"it belongs to the user {info.st_uid}"
    mode = stat.S_IMODE(info.st_mode)
    return f"other users may write it (mode {mode:o})" if mode & 0o022 and not stat.S_ISLNK(info.st_mode) else None


def distrust_folder(folder: Path) -> str | None:
    """Why what lies in a folder may be another user's work; None where it is not, and where there is no folder."""
    try:
        for info in (os.lstat(folder), os.stat(folder)):  # a link, then what it leads to
            if reason := distrust(info):
                return reason
    except OSError:
        pass  # it is not there or cannot be reached
    return None


def obstacle(folder: Path, space: int) -> str | None:
    """Why programs of up to `space` bytes cannot be made in a folder, which is made if missing; None where they can."""
    try:
        for level in (folder.parent, folder):
            level.mkdir(mode=0o755, parents=True, exist_ok=True)
        if reason := distrust_folder(folder):
            return reason
        system = os.statvfs(folder)
        free = system.f_bavail * system.f_frsize
        if system.f_flag & getattr(os, "ST_NOEXEC", 0):
            return "no program runs from there, it is mounted noexec"
        if system.f_blocks and free < space:
            return f"{free / 2**20:.1f} MiB are free there, {space / 2**20:.0f} are needed"
        with scratch(folder):
            pass  # the truth, whatever modes and mounts say
    except OSError as error:
        return said(error)
    return None


def said(error: OSError) -> str:
    """What the system says of a file, and which file it is, in one line."""
    parts = [str(part) for part in (error.strerror, error.filename) if part is not None]
    return ": ".join(parts) or str(error)


# --- One process at a time


@contextlib.contextmanager
def alone(folder: Path, patience: float, waiting: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Holds a folder's lock, which ends with the process; gives False where it could not be held.

    Args:
      folder: which exists.
      patience: seconds after which the wait ends without the lock.
      waiting: called once if another process or thread holds it.
    """
    try:
        file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError:  # something else has the name
        yield False
        return
    try:
        yield _locked(file, patience, waiting)
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # a forked child may hold the file open
        os.close(file)


def _locked(file: int, patience: float, waiting: Callable[[], None]) -> bool:
    end, told = time.monotonic() + patience, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
        except OSError:  # a file system without locks
            return False
        if not told:
            waiting()
            told = True
        time.sleep(0.1)


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder inside another for what is unfinished, removed at the end; `sweep` removes it after a killed process."""
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder, ignore_cleanup_errors=True) as made:
        yield Path(made)


def sweep(folder: Path, alone: bool) -> None:
    """Removes what killed processes left unfinished: all of it for the holder of the lock, else only what is old."""
    for path in folder.glob(UNFINISHED + "*"):
        with contextlib.suppress(OSError):
            if alone or time.time() - path.lstat().st_mtime > _ABANDONED:
                remove(path)


def remove(path: Path) -> None:
    """Removes a file, a link (not what it leads to) or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# --- Whole files


class Seal(NamedTuple):
    """The last line of a sealed file: the digest of all before it, of its name and of its maker."""

    digest: str
    maker: str


class DamagedError(Exception):
    """A sealed file is not as it was written, or may be another user's; the message says what is wrong with it."""


def _digest(body: bytes, name: str, maker: str) -> str:
    return hashlib.sha256(b"\0".join((hashlib.sha256(body).digest(), name.encode(), maker.encode()))).hexdigest()


def seal(made: Path, name: str, maker: str) -> None:
    """Ends a file with a line that `read_seal` checks. A shared library stays one: loaders follow its own tables."""
    body = made.read_bytes()
    line = json.dumps({"maker": maker, "sha256": _digest(body, name, maker)})
    with made.open("ab") as file:
        file.write(b"\n" + line.encode())
    made.chmod(stat.S_IMODE(made.stat().st_mode) & 0o755)


def read_seal(path: Path) -> Seal | None:
    """Reads all of a sealed file and checks it; None where there is none.

    Raises:
      DamagedError: it cannot be read, another user may have written it, or its bytes are not those that were sealed.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe in its place must not block
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        what = "it is a link" if error.errno == errno.ELOOP else f"it cannot be read ({error.strerror})"
        raise DamagedError(what) from error
    try:
        info = os.fstat(file)
        if not stat.S_ISREG(info.st_mode):
            raise DamagedError("it is no file")
        if reason := distrust(info):
            raise DamagedError(reason)
        if info.st_size > _LARGEST:
            raise DamagedError(f"it has {info.st_size} bytes")
        with open(file, "rb", closefd=False) as whole:
            body, _, line = whole.read().rpartition(b"\n")
    except OSError as error:
        raise DamagedError(f"it cannot be read ({error.strerror})") from error
    finally:
        os.close(file)
    try:
        last = json.loads(line)
        found = Seal(last["sha256"], last["maker"])
        right = found.digest == _digest(body, path.name, found.maker)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        right = False
    if not right:
        raise DamagedError("it is damaged, its bytes are not those that were written")
    return found


def publish(made: Path, path: Path) -> None:
    """Moves a finished file to its place: after a power failure there is the old file, or none, or all of the new one.

    What has the name is replaced, a folder too. Both lie on one file system.
    """
    with made.open("rb") as file:
        os.fsync(file.fileno())
    if path.is_dir() and not path.is_symlink():
        remove(path)
    os.replace(made, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some file systems refuse it; the file is there
            os.fsync(folder)
    finally:
        os.close(folder)
