"""What this machine has of what the toolkit can use, and one line on how to get what is missing.

With `build`, the compiled kernels that are missing are built: ahead of their first use, or into an image's cache.
"""

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
from typing import NamedTuple

import jax

import compressx
from compressx.cache import cache_folder
from compressx.kernels import native, recurrent
from compressx.native import build as compiled
from compressx.native import conv, depthwise

LIBRARIES = (native.LIBRARY, recurrent.LIBRARY, conv.LIBRARY, depthwise.LIBRARY)

# distribution -> the extra of setup.cfg that brings it; None: the base install
PACKAGES: dict[str, str | None] = {
    **dict.fromkeys(("jax", "jaxlib", "flax", "optax", "numpy", "safetensors")),
    **dict.fromkeys(("absl-py", "ml_collections", "orbax-checkpoint", "tensorflow-datasets"), "experiments"),
    **dict.fromkeys(("array_record", "scikit-learn", "matplotlib", "rich"), "experiments"),
    **dict.fromkeys(("flatbuffers", "onnx", "onnxruntime"), "export"),
    "pillow": "images",
    **dict.fromkeys(("flwr", "cryptography"), "federated"),
    "torch": "benchmarks",
}


class Check(NamedTuple):
    """One thing looked at.

    Attributes:
      name: what.
      ok: whether it is there.
      needed: whether nothing works without it.
      found: version or place; why not, where it is missing.
      fix: what to do; empty where all is well.
    """

    name: str
    ok: bool
    needed: bool
    found: str
    fix: str = ""


def examine(build: bool = False) -> list[Check]:
    """Looks at everything: Python, packages, devices, compiler, cache and compiled kernels.

    Args:
      build: whether kernels are compiled that are not yet; else nothing is changed.
    """
    return [
        Check("python", True, True, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Check("compressx", True, True, compressx.__version__),
        *map(package, PACKAGES),
        devices(),
        compiler(),
        cache(),
        kernels(build),
    ]


def package(name: str) -> Check:
    """A Python distribution; where it is missing, the command that installs it as setup.cfg asks for it."""
    extra = PACKAGES[name]
    try:
        return Check(name, True, extra is None, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        why = "not installed" if extra is None else f"not installed; belongs to the extra {extra}"
        return Check(name, False, extra is None, why, f"pip install '{_requirement(name)}'")


def _requirement(name: str) -> str:
    """The distribution with the bounds that this project sets, as pip takes it."""
    try:
        listed = importlib.metadata.requires("compressx") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder, not installed
        listed = []
    wanted = [line.partition(";")[0].strip() for line in listed]
    return next((w for w in wanted if re.match(rf"{re.escape(name)}\b(?![-.])", w, re.IGNORECASE)), name)


def devices() -> Check:
    """The devices that jax computes on."""
    try:
        found = jax.devices()
    except RuntimeError as error:
        return Check("devices", False, True, str(error).split("\n")[0], "unset JAX_PLATFORMS, or install jax for it")
    kinds = ", ".join(sorted({d.device_kind for d in found}))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Check("devices", True, True, f"{len(found)} x {found[0].platform} ({kinds}), {cores} cores usable")


def compiler() -> Check:
    """A C++17 compiler for the native CPU kernels; without one XLA's formulations run."""
    fix = "install g++ or clang++ (Debian: apt-get install g++), or set $CXX; without one XLA runs all kernels"
    try:
        words = compiled.compiler()
    except compiled.UnavailableError as error:
        return Check("C++ compiler", False, False, str(error), fix)
    command = shlex.join(words)
    try:
        run = subprocess.run([*words, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Check("C++ compiler", False, False, f"{command} does not run: {error}", fix)
    return Check("C++ compiler", True, False, f"{command}: {(run.stdout.splitlines() or ['no version'])[0]}")


def cache() -> Check:
    """The folder for compiled kernels and tuned plans, which is made on first use."""
    try:
        folder = cache_folder()
    except FileNotFoundError as error:
        return Check("cache folder", False, False, str(error.strerror), "set $COMPRESSX_CACHE to a folder")
    above = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        return Check("cache folder", False, False, f"{folder} cannot be written", "set $COMPRESSX_CACHE to a folder")
    free = shutil.disk_usage(above).free / 1e9
    state = "exists" if folder.exists() else "made on first use"
    return Check("cache folder", True, False, f"{folder} ({state}), {free:.1f} GB free")


def kernels(build: bool) -> Check:
    """The compiled kernels: where they lie, and what is not built; needed where building them was asked for."""
    name = "compiled kernels"
    if os.environ.get("COMPRESSX_NATIVE", "on") == "off":
        return Check(name, False, build, "turned off by COMPRESSX_NATIVE=off", "unset it; XLA runs all kernels")
    faults: list[str] = []
    folders: list[str] = []
    wait = 0
    for library in LIBRARIES:
        path = None
        try:
            if build:
                compiled.obtain(library, faults.append)
            path, found = compiled.find(library)
            faults += found
        except compiled.UnavailableError as error:
            faults.append(str(error))
        if path is None:
            wait += library.seconds
        else:
            folders.append(str(path.parent))
    lines = [f"{len(folders)} of {len(LIBRARIES)} are built"]
    lines += [f"in {folder}" for folder in dict.fromkeys(folders)] + list(dict.fromkeys(faults))
    fix = f"compressx doctor --build (about {wait} s); else each is built on its first use"
    if build:
        fix = "mend what is named here; until then XLA runs in place of those that are missing"
    return Check(name, not wait, build, " ".join("; ".join(lines).split()), fix if wait else "")
