"""C++ sources as shared libraries: compiled once per machine, kept in the cache folder, checked, and opened.

A library's name holds a hash of everything that its code follows from: sources, headers (XLA's too), flags, machine,
and the processor where the flags name it. The compiler is not part of it: what is built is found where there is no
compiler, and what another one would build computes the same. Delete the folder `native` of the cache to build with
another compiler. `compressx doctor --build` builds ahead; the folder may then be read-only, or of root.

A library is made under another name, sealed with its digest and renamed (`cache`), and only one with the right digest
is opened, which neither other users could have written. Whatever is wrong is said in one line, once per process.

    CXX                      the compiler's command, split as a shell does; g++ or clang++ where it is not set
    COMPRESSX_NATIVE         off: no library is built or opened, XLA's formulations run
    COMPRESSX_NATIVE_FLAGS   further flags (`-fsanitize=address -g`)
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from compressx import cache

log = logging.getLogger("compressx.native")

_ROOT = Path(__file__).parent
FAST = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
PORTABLE = ("-O3", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC", "-w")
_LONGEST = 900  # seconds a compiler may take, or another process be waited for
_LINES = 3  # of a compiler that fails
_SPACE = 16 << 20  # bytes that have to be free: with what the compiler writes on the way, the largest build takes 4 MB


class Library(NamedTuple):
    """A C++ source and how it becomes a library.

    Attributes:
      source: the file; headers beside it and those of this folder (`parallel.h`) are its own.
      targets: name of the FFI target -> symbol of the handler.
      flags: of the compiler.
      seconds: about how long it compiles, for the line that says so.
    """

    source: Path
    targets: Mapping[str, str]
    flags: Sequence[str] = PORTABLE
    seconds: int = 5


class UnavailableError(Exception):
    """A library could not be obtained; the message says why and what to do."""


def enabled() -> bool:
    """True where models may use compiled kernels: on one CPU device (several would each compute all of it)."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def processor() -> str:
    """What `-march=native` and timings depend on: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _words(variable: str) -> list[str]:
    text = os.environ.get(variable, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UnavailableError(f"${variable}={text!r} cannot be split into words ({error}): correct it") from error


def compiler() -> list[str]:
    """The words of the compiler's command: those of `$CXX`, else g++, else clang++.

    Raises:
      UnavailableError: there is none, or `$CXX` names a program that is not there.
    """
    words = _words("CXX")
    if not words:
        found = shutil.which("g++") or shutil.which("clang++")
        if found is None:
            raise UnavailableError("there is no C++ compiler (Debian: apt-get install g++; or set $CXX)")
        return [found]
    if shutil.which(words[0]) is None:
        raise UnavailableError(f"$CXX={os.environ['CXX']!r} is not found: correct it, or unset it for g++ or clang++")
    return words


def _identity(command: Sequence[str]) -> str:
    """Tells compilers apart without running them: the words, and size and time of each program among them."""
    facts: list[object] = []
    for word in command:
        path = shutil.which(word)
        info = os.stat(path) if path else None
        facts.append((word, path, info.st_size, info.st_mtime_ns) if info else word)
    return repr(facts)


def _name(library: Library, flags: Sequence[str]) -> str:
    key = hashlib.sha256()
    own = (p for folder in (library.source.parent, _ROOT) for p in sorted(folder.glob("*.h")))
    for path in (library.source, *own, *sorted(Path(jax.ffi.include_dir()).rglob("*.h"))):
        text = path.read_bytes()
        key.update(f"{path.name} {len(text)} ".encode() + text)
    native = any(flag.endswith("=native") for flag in flags)
    machine = (sys.platform, platform.machine(), processor() if native else "")
    key.update(repr((tuple(flags), machine)).encode())
    return f"{library.source.stem}-{key.hexdigest()[:24]}.so"


def _named(library: Library) -> tuple[str, list[str]]:
    """A library's file name, and the flags that it is compiled with."""
    flags = [*library.flags, *_words("COMPRESSX_NATIVE_FLAGS")]
    try:
        return _name(library, flags), flags
    except OSError as error:
        raise UnavailableError(f"{error.filename} cannot be read ({error.strerror}): install compressx anew") from error


def _folders() -> list[Path]:
    """Where libraries may lie: in the cache, then in a folder of this user's own among the temporary ones."""
    found = []
    with contextlib.suppress(FileNotFoundError):  # without a home folder the second has to do
        found.append(cache.cache_folder("native"))
    with contextlib.suppress(FileNotFoundError):
        found.append(Path(tempfile.gettempdir()) / f"compressx-{os.geteuid()}")
    return found


def _look(path: Path) -> tuple[cache.Seal | None, str | None]:
    """The seal of a library that is whole, or what is wrong with it or with its folder; neither where there is none."""
    reason = cache.distrust_folder(path.parent)
    if reason is not None:
        return None, reason
    try:
        return cache.read_seal(path), None
    except cache.DamagedError as error:
        return None, str(error)


def find(library: Library) -> tuple[Path | None, list[str]]:
    """Where a library lies that can be used, if anywhere, and what is wrong with others; builds and opens nothing.

    Raises:
      UnavailableError: a source cannot be read, or `$COMPRESSX_NATIVE_FLAGS` cannot be split into words.
    """
    name = _named(library)[0]
    faults: list[str] = []
    for folder in _folders():
        seal, fault = _look(folder / name)
        if seal is not None:
            return folder / name, faults
        faults += [f"{folder / name}: {fault}"] if fault else []
    return None, faults


def _open(path: Path, library: Library) -> ctypes.CDLL:
    try:
        opened = ctypes.CDLL(str(path.absolute()))
        for symbol in library.targets.values():
            getattr(opened, symbol)
    except (OSError, AttributeError) as error:
        advice = "delete it and set $CXX to another compiler to build it anew"
        raise UnavailableError(f"{path} cannot be opened ({error}): {advice}") from error
    return opened


def obtain(library: Library, tell: Callable[[str], None]) -> ctypes.CDLL:
    """Opens a library, which is built where it is not yet.

    Args:
      library: which.
      tell: is given a line for everything that was wrong and could be helped.

    Raises:
      UnavailableError: it could not be obtained.
    """
    name, flags = _named(library)
    try:
        command, lacking = compiler(), ""
    except UnavailableError as error:
        command, lacking = [], str(error)
    maker, folders = _identity(command), _folders()
    faults: list[str] = []
    for folder, other in zip(folders, [*folders[1:], None], strict=True):
        path = folder / name
        seal, fault = _look(path)
        if seal is not None:
            try:
                return _open(path, library)
            except UnavailableError as error:
                same = seal.maker == maker and cache.obstacle(folder, _SPACE) is None
                if not command or same:  # the same compiler would build the same in the same folder
                    raise
                fault = f"it cannot be opened ({error.__cause__})"
        if not command:
            faults += [f"{path}: {fault}"] if fault else []
            continue
        problem = cache.obstacle(folder, _SPACE)
        if fault is not None and fault != problem:
            tell(f"{path}: {fault}; it is built anew")
        if problem is None:
            problem = _build(library, [*command, *flags], maker, path, seal)
        if problem is None:
            return _open(path, library)
        then = f"until then they lie in {other}" if other else "there is no other to try"
        tell(f"{folder} cannot hold compiled libraries ({problem}): set $COMPRESSX_CACHE to another folder; {then}")
    if command:
        raise UnavailableError("no folder can hold compiled libraries: set $COMPRESSX_CACHE to one of your own")
    found = "; ".join(faults) or f"no library for this machine is in {' or '.join(map(str, folders))}"
    raise UnavailableError(f"{found}, and {lacking}")


def _build(library: Library, command: list[str], maker: str, path: Path, old: cache.Seal | None) -> str | None:
    """Builds a library at its path, unless another process has done so; returns what is wrong with the folder, if so.

    Raises:
      UnavailableError: the compiler failed.
    """
    folder = path.parent
    waiting = lambda: log.warning("compressx: waiting for another process that builds libraries in %s", folder)
    try:
        with cache.alone(folder, _LONGEST, waiting) as alone:
            if _look(path)[0] not in (None, old):
                return None
            cache.sweep(folder, alone)
            about = "compressx: compiling %s for this machine, about %d s, once; it is kept in %s"
            log.warning(about, library.source.name, library.seconds, folder)
            with cache.scratch(folder) as scratch:
                made = scratch / "library"  # without a suffix: nothing takes it for one that is finished
                includes = ("-I", jax.ffi.include_dir(), "-I", str(_ROOT))
                _compile([*command, *includes, str(library.source)], made)
                cache.seal(made, path.name, maker)
                cache.publish(made, path)
        return _look(path)[1]  # a full disk does not always raise while writing
    except OSError as error:
        return cache.said(error)


def _compile(command: list[str], made: Path) -> None:
    """Runs a compiler, which leaves beside `made` what it writes on the way; stops all of it when interrupted."""
    about = shlex.join(command)  # a command that can be repeated, without the folder that is then gone
    try:
        process = subprocess.Popen(
            [*command, "-o", str(made)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(made.parent)},
            start_new_session=True,
        )
    except OSError as error:
        raise UnavailableError(f"{about} cannot be run ({error.strerror}): correct $CXX") from error
    try:
        said = process.communicate(timeout=_LONGEST)[0].decode(errors="replace")
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the driver, and the compiler and linker that it started
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise UnavailableError(f"{about} ran longer than {_LONGEST} s") from error
        raise
    if process.returncode != 0:
        lines = [line.strip()[:200] for line in said.splitlines() if line.strip()]
        reason = " | ".join(lines[:_LINES]) or "it said nothing"
        raise UnavailableError(
            f"{about} ended with exit code {process.returncode}, writing to {made.parent.parent}: {reason}"
        )
    if not made.is_file():
        raise UnavailableError(f"{about} wrote no library: correct $CXX")


@functools.cache
def _tell(line: str) -> None:
    """Warns of a thing once per process, however many libraries meet it."""
    warnings.warn(line, RuntimeWarning, stacklevel=3)


def load(library: Library) -> ctypes.CDLL | None:
    """Opens a library, compiled where it is not yet, and registers its XLA handlers for the CPU.

    Returns:
      The library; None (after a warning, unless it is turned off) where it could not be obtained.
    """
    if os.environ.get("COMPRESSX_NATIVE", "on") == "off":
        return None
    lines: list[str] = []
    opened = None
    try:
        opened = obtain(library, lines.append)
        for name, symbol in library.targets.items():
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(opened, symbol)), platform="cpu")
    except UnavailableError as error:
        lines.append(f"XLA's formulation runs in place of compiled kernels, which is slower: {error}")
    for line in lines:
        _tell(" ".join(line.split()))
    return opened
