"""The body of `compressx reconstruct`: a saved model and a folder of examples, a compressed model beside it."""

import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from compressx import formats
from compressx.formats import SavedModel
from compressx.reconstruction.reconstruct import reconstruct
from compressx.reconstruction.report import Layer
from compressx.rules import Rules


def examples(folder: str | os.PathLike[str], count: int, batch: int) -> list[NDArray[Any]]:
    """The first examples of a folder of .npy files, in the order of the files' names, in batches.

    Args:
      folder: of files `[n, ...]`, all of one shape behind axis 0.
      count: examples at most.
      batch: examples a batch; the last one may be smaller.

    Raises:
      ValueError: there is none, a file is not readable without unpickling, or shapes differ; the text names the file.
    """
    files = sorted(Path(folder).glob("*.npy"))
    if not files:
        raise ValueError(f"{os.fspath(folder)} holds no .npy file of examples")
    held: list[NDArray[Any]] = []
    for file in files:
        try:
            x = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{file}: not a readable .npy file: {error}") from None
        if x.ndim < 1 or x.dtype.kind not in "fiub" or (held and x.shape[1:] != held[0].shape[1:]):
            first = f", those of {files[0].name} {list(held[0].shape[1:])}" if held else ""
            raise ValueError(f"{file}: {x.dtype} {list(x.shape)} are no examples, one an entry of axis 0{first}")
        held.append(np.asarray(x[: count - sum(map(len, held))]))
        if sum(map(len, held)) >= count:
            break
    whole = np.concatenate(held)
    if not len(whole):
        raise ValueError(f"{os.fspath(folder)}: its files hold no example")
    return [whole[k : k + batch] for k in range(0, len(whole), batch)]


def run(
    saved: SavedModel, model: Any, rules: Rules, batches: list[NDArray[Any]], out: str
) -> tuple[dict[str, Any], list[str]]:
    """Reconstructs a saved model, writes it, and says what became of it.

    Args:
      saved: the dense model.
      model: its network, a flax module or `f(params, x)`.
      rules: the sets.
      batches: of inputs.
      out: the file to write.

    Returns:
      A JSON object, and the same as lines of text.
    """

    def progress(number: int, whole: int, layer: Layer) -> None:
        print(f"{number}/{whole} {layer.path}: error {layer.error:.4f}, {layer.seconds:.1f} s", file=sys.stderr)

    params = jax.tree.map(jnp.asarray, saved.params)
    hard, report = reconstruct(model, params, rules, batches, project_rest=True, progress=progress)
    sizes = formats.save_model(out, hard, rules, model=saved.model, extra=saved.extra)
    count = sum(len(x) for x in batches)
    agreement = "" if report.agreement is None else f", the same answer on {100 * report.agreement:.1f} % of them"
    lines = [
        report.table(),
        f"{count} examples{agreement}; relative squared error of the outputs {report.output_error:.4f}",
        f"{out}: {sizes.dense} B dense, {sizes.packed} B packed, {report.seconds:.1f} s",
    ]
    layers = [{**layer._asdict(), "weights": list(layer.weights)} for layer in report.layers]
    data = {"out": out, "examples": count, "agreement": report.agreement, "output_error": report.output_error}
    data |= {"layers": layers, "norms": list(report.norms), "biases": list(report.biases)}
    data |= {"bytes": {"dense": sizes.dense, "packed": sizes.packed}, "seconds": report.seconds}
    return data, [line for text in lines for line in text.splitlines()]
