"""Convolutions with kernels of which some positions are unused: the used ones are gathered, and multiplied densely.

XLA's convolution cannot skip single positions (i, j, c) of its kernel. Gathering the used rows of the patches and one
dense product can; whether that is faster depends on the machine and on how many are used, so it is measured.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressx.tree import paths

Pads = tuple[tuple[int, int], ...]


def gathered_conv(
    x: jax.Array,
    matrix: jax.Array,
    positions: np.ndarray,
    window: tuple[int, ...],
    strides: tuple[int, ...],
    pads: Pads,
) -> jax.Array:
    """The convolution with a kernel whose rows outside `positions` are zero, as one product of the rows inside.

        y[n, h, w, f] = sum over used (i, j, c) of  x[n, h s + i - pad, w s + j - pad, c] * matrix[(i, j, c), f]

    Args:
      x: `[n, h, w, cin]`.
      matrix: `[p, cout]`, the rows of the kernel's GEMM view `[kh * kw * cin, cout]` at `positions`.
      positions: `[p]`, increasing, concrete.
      window: (kh, kw, cin).
      strides: rows, columns.
      pads: zeros before and after, per axis.

    Returns:
      `[n, oh, ow, cout]`.

    Example:
      >>> x, matrix = jnp.arange(9.0).reshape(1, 3, 3, 1), jnp.asarray([[1.0]])
      >>> corner = np.array([8])  # of a 3x3 kernel's positions the last alone is used
      >>> compressx.compaction.gathered_conv(x, matrix, corner, (3, 3, 1), (1, 1), ((0, 0), (0, 0))).item()
      8.0
    """
    kh, kw, cin = window
    sh, sw = strides
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    oh, ow = (x.shape[1] - kh) // sh + 1, (x.shape[2] - kw) // sw + 1
    taps, channel = np.divmod(np.asarray(positions), cin)
    parts = []
    for tap in np.unique(taps):
        i, j = divmod(int(tap), kw)
        seen = x[:, i : i + sh * (oh - 1) + 1 : sh, j : j + sw * (ow - 1) + 1 : sw]
        used = channel[taps == tap]
        parts.append(seen if used.size == cin else jnp.take(seen, used, axis=-1))
    return jnp.tensordot(jnp.concatenate(parts, -1), matrix, 1)


def used_positions(kernel: np.ndarray) -> np.ndarray:
    """The rows of the GEMM view of `[kh, kw, cin, cout]` with a non-zero, int32, at least one."""
    used = np.flatnonzero((np.asarray(kernel) != 0).any(-1).ravel()).astype(np.int32)
    return used if used.size else np.zeros(1, np.int32)


def gather(
    variables: Any, choose: Callable[[str, np.ndarray], bool] = lambda path, kernel: True
) -> tuple[Any, dict[str, np.ndarray]]:
    """Replaces convolution kernels with unused positions by the matrix of the used ones.

    Args:
      variables: of a compact network.
      choose: `(path, kernel) -> bool`, which of the kernels that have unused positions.

    Returns:
      The variables, and path -> positions, as `compact.smaller` takes them.

    Example:
      >>> kernel = jnp.zeros((3, 3, 1, 2)).at[1, 1].set(2.0)
      >>> variables, positions = compressx.compaction.gather({"kernel": kernel})
      >>> variables["kernel"].shape, positions["kernel"].tolist()
      ((1, 2), [4])
    """
    leaves, treedef = jax.tree.flatten(variables)
    found: dict[str, np.ndarray] = {}
    out = []
    for path, leaf in zip(paths(variables), leaves, strict=True):
        if np.ndim(leaf) == 4:
            kernel = np.asarray(leaf)
            used = used_positions(kernel)
            if used.size < kernel[..., 0].size and choose(path, kernel):
                found[path] = used
                leaf = jnp.asarray(kernel.reshape(-1, kernel.shape[-1])[used])
        out.append(leaf)
    return jax.tree.unflatten(treedef, out), found


def scatter(variables: Any, positions: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """The inverse of `gather`: the matrices as kernels again, zero at unused positions.

    Args:
      variables: from `gather`.
      positions: likewise.
      shapes: path -> `(kh, kw, cin, cout)`.
    """
    leaves, treedef = jax.tree.flatten(variables)
    out = []
    for path, leaf in zip(paths(variables), leaves, strict=True):
        if path in positions:
            kernel = np.zeros((int(np.prod(shapes[path][:3])), shapes[path][3]), np.asarray(leaf).dtype)
            kernel[positions[path]] = np.asarray(leaf)
            leaf = jnp.asarray(kernel.reshape(shapes[path]))
        out.append(leaf)
    return jax.tree.unflatten(treedef, out)
