"""C++ sources as shared libraries: compiled once per machine, into the user's cache folder, and opened.

A library's name holds a hash of everything it depends on (sources, headers, flags, compiler, processor where the flags
name it, jax), so that nothing stale is ever opened. `COMPRESSX_NATIVE=off` in the environment turns every library off,
and `COMPRESSX_NATIVE_FLAGS` adds flags (`-fsanitize=address -g`). Without a compiler `load` returns None.
Headers are those beside a source and those of this folder (`parallel.h`: work shared out over threads).
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

_ROOT = Path(__file__).parent
FAST = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
PORTABLE = ("-O3", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC", "-w")


def enabled() -> bool:
    """True where models may use compiled kernels: on one CPU device (several would each compute all of it)."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def _cache_folder() -> Path:
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="compressx-"))  # nobody else's library is ever loaded


def cache_folder() -> Path:
    """Where compiled libraries and tuning results are kept: `$XDG_CACHE_HOME/compressx` or `~/.cache/compressx`."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "compressx"


def processor() -> str:
    """What `-march=native` and timings depend on: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _compile(compiler: str, source: Path, flags: Sequence[str]) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    headers = [p for folder in (source.parent, _ROOT) for p in sorted(folder.glob("*.h"))]
    texts = [p.read_bytes() for p in (source, *headers)]
    machine = processor() if "-march=native" in flags else platform.machine()
    key = hashlib.sha256(b"\0".join(texts) + version + repr((tuple(flags), machine, jax.__version__)).encode())
    library = _cache_folder() / f"{source.stem}-{key.hexdigest()[:24]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built = os.path.join(scratch, "library.so")
            command = [compiler, *flags, "-I", jax.ffi.include_dir(), "-I", str(_ROOT), str(source), "-o", built]
            subprocess.run(command, capture_output=True, check=True, timeout=900)
            os.replace(built, library)  # atomic: processes that start together each see a whole file or none
    return library


def load(source: Path, targets: Mapping[str, str], flags: Sequence[str] = PORTABLE) -> ctypes.CDLL | None:
    """Opens the library of a source, compiled where it is not yet, and registers its XLA handlers for the CPU.

    Args:
      source: the C++ file; headers beside it are its own.
      targets: name of the FFI target -> symbol of the handler.
      flags: of the compiler.

    Returns:
      The library; None (after a warning, unless it is turned off or there is no compiler) where it cannot be had.
    """
    if os.environ.get("COMPRESSX_NATIVE", "on") == "off":
        return None
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    extra = os.environ.get("COMPRESSX_NATIVE_FLAGS", "").split()
    try:
        library = ctypes.CDLL(str(_compile(compiler, source, (*flags, *extra))))
        for name, symbol in targets.items():
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    except (OSError, subprocess.SubprocessError, AttributeError) as e:
        detail = getattr(e, "stderr", None)
        text = detail.decode(errors="replace")[-500:] if isinstance(detail, bytes) else str(e)
        warnings.warn(f"{source.name} cannot be used, XLA is slower: {text}", RuntimeWarning, stacklevel=2)
        return None
    return library
