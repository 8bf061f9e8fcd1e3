"""The compiled kernels: whether they run here, with which instruction set, and their calls."""

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressx.kernels.grid import Grid
from compressx.native import build as compiled

ISAS = ("generic", "avx2", "avx512")
LANES = {"generic": 4, "avx2": 8, "avx512": 16}
WIDTHS = {"generic": (3, 10), "avx2": (3, 10), "avx512": (6, 16)}  # most vectors of a tile: of visits, of runs
_TARGETS = {
    "compressx_pattern_conv": "CompressxPatternConv",
    "compressx_to_planes": "CompressxToPlanes",
    "compressx_from_planes": "CompressxFromPlanes",
    "compressx_resample": "CompressxResample",
}
LIBRARY = compiled.Library(Path(__file__).with_name("pattern_conv.cc"), _TARGETS, seconds=20)


@functools.cache
def _library() -> ctypes.CDLL | None:
    return compiled.load(LIBRARY)


def available() -> bool:
    """True if the native kernels run here; compiles them at the first call, some seconds once per machine.

    Returns:
      Whether convolutions run natively; False on another backend than the CPU, without a compiler, or with
      `COMPRESSX_NATIVE=off`.

    Example:
      >>> isinstance(compressx.kernels.available(), bool)
      True
    """
    return jax.default_backend() == "cpu" and _library() is not None


def isa() -> str:
    """The instruction set in use: the best of the processor, or `COMPRESSX_ISA` where it is set.

    Raises:
      RuntimeError: there is no library, see `available`.
      ValueError: `COMPRESSX_ISA` is unknown or the processor lacks it.
    """
    library = _library()
    if library is None:
        raise RuntimeError("the native kernels are not available here: no compiler, or COMPRESSX_NATIVE=off")
    best = int(library.compressx_best_isa())
    wanted = os.environ.get("COMPRESSX_ISA")
    if wanted is None:
        return ISAS[best]
    if wanted not in ISAS or ISAS.index(wanted) > best:
        raise ValueError(f"COMPRESSX_ISA={wanted!r}: this processor has {', '.join(ISAS[: best + 1])}")
    return wanted


def active_path() -> str:
    """What convolutions run on: `native/avx512`, `native/avx2`, `native/generic`, or `xla`.

    On a GPU or TPU that is `xla`, though single layers may run on Pallas: their own `path` says so.

    Returns:
      The path, a word for reports.

    Raises:
      ValueError: `COMPRESSX_ISA` is unknown, or the processor lacks it.

    Example:
      >>> compressx.kernels.active_path().split("/")[0] in ("native", "xla")
      True
    """
    return f"native/{isa()}" if available() else "xla"


def peak_gflops() -> float:
    """10^9 multiplications and additions a second of one core, measured on registers alone; 0 without the library."""
    library = _library()
    if library is None:
        return 0.0
    library.compressx_peak.restype = ctypes.c_double
    return float(library.compressx_peak())


def call(target: str, shape: tuple[int, ...], *operands: Any, isa: str, **attributes: int) -> jax.Array:
    """One FFI call with a float32 result and int64 attributes."""
    if not available():
        raise RuntimeError("the native kernels are not available here: no compiler, or COMPRESSX_NATIVE=off")
    out = jax.ShapeDtypeStruct(shape, jnp.float32)
    given = {name: np.int64(value) for name, value in attributes.items()}
    f = jax.ffi.ffi_call(target, out, vmap_method="sequential")
    result: jax.Array = f(*operands, isa=np.int64(ISAS.index(isa)), **given)
    return result


def isa_of(g: Grid) -> str:
    """The instruction set whose vectors a grid is laid out for."""
    return next(name for name, lanes in LANES.items() if lanes == g.lanes)


def to_planes(x: jax.Array, g: Grid, threads: int = 0) -> jax.Array:
    """Images `[n, h, w, c]` as planes `[c, plane, lanes]`, see `grid`."""
    shape = (x.shape[3], g.plane, g.lanes)
    attributes = {"row": g.row, "image": g.image, "segment": g.segment, "margin": g.margin, "threads": threads}
    return call("compressx_to_planes", shape, x, isa=isa_of(g), **attributes)


def from_planes(planes: jax.Array, g: Grid, threads: int = 0) -> jax.Array:
    """Inverse of `to_planes`."""
    shape = (g.n, g.h, g.w, planes.shape[0])
    attributes = {"row": g.row, "image": g.image, "segment": g.segment, "margin": g.margin, "threads": threads}
    return call("compressx_from_planes", shape, planes, isa=isa_of(g), **attributes)


def resample(
    planes: jax.Array, g: Grid, out: Grid, source: Any, valid: Any, window: tuple[int, int], threads: int = 0
) -> jax.Array:
    """Planes of another grid, `len(source)` a channel: the maximum of the windows that begin at `source`."""
    shape = (planes.shape[0] * source.shape[0], out.plane, out.lanes)
    attributes = {"segment": g.segment, "margin": g.margin, "row": g.row, "threads": threads}
    attributes |= {"out_segment": out.segment, "out_margin": out.margin, "rows": window[0], "columns": window[1]}
    return call("compressx_resample", shape, planes, source, valid, isa=isa_of(g), **attributes)
