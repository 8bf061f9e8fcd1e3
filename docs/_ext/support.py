"""The table of docs/support.md: what packs, compiles, exports and compacts. `python docs/_ext/support.py` rewrites it.

Nothing in it is typed by hand: every set is projected onto a dense and a convolution weight, packed, and looked at.
`tests/test_support_table.py` holds the page to it.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

import compressx as cx
from compressx import formats
from compressx.kernels import recurrent, schedule
from compressx.rules import resolve

PAGE = Path(__file__).resolve().parents[1] / "support.md"
BEGIN, END = "<!-- support -->", "<!-- /support -->"
DENSE, CONV = (64, 64), (3, 3, 64, 64)

SETS: dict[str, cx.Constraint] = {
    "unstructured(0.25)": cx.unstructured(0.25),
    "n_of_m(2, 4)": cx.n_of_m(2, 4),
    "bank_balanced(0.25, bank=8)": cx.bank_balanced(0.25, bank=8),
    "block_max(4)": cx.block_max(4),
    "darb(0.25)": cx.darb(0.25),
    "block((4, 4), 0.25)": cx.block((4, 4), 0.25),
    "bsp(0.5, 0.5)": cx.bsp(0.5, 0.5),
    "filters(0.25)": cx.filters(0.25),
    "channels(0.25)": cx.channels(0.25),
    "filters_and_columns(0.5, 0.5)": cx.filters_and_columns(0.5, 0.5),
    "crossbar_aware(0.5, 0.5)": cx.crossbar_aware(0.5, 0.5, rows=16, cols=16),
    "pattern(k=8)": cx.pattern("natural", k=8),
    "connectivity(0.25)": cx.connectivity(0.25),
    "pattern_connectivity(0.25, k=8)": cx.pattern_connectivity(0.25, k=8),
    "polarize(8)": cx.polarize(8),
    "quantize(4)": cx.quantize(4),
    "unify((4, 4), 1.0)": cx.unify((4, 4), 1.0),
    "unstructured(0.25) & quantize(4)": cx.unstructured(0.25) & cx.quantize(4),
    "pattern_connectivity(0.25, k=8) & quantize(4)": cx.pattern_connectivity(0.25, k=8) & cx.quantize(4),
}


def _stored(constraint: cx.Constraint, shape: tuple[int, ...]) -> tuple[np.ndarray, formats.Packed] | None:
    """The projection of a random weight, and it packed; None where the set does not apply to the shape."""
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    try:
        (b,) = resolve([("w", constraint)], {"w": w})
        structure = b.choose(w)
        z = np.asarray(b.project(w, structure))
    except ValueError:
        return None
    return z, formats.pack(z, b.constraint, structure)


def _packs(found: tuple[np.ndarray, formats.Packed] | None) -> str:
    if found is None:
        return "–"
    z, packed = found
    return f"`{packed.format}`, {z.nbytes / formats.nbytes(packed):.1f}x"


def _compiles(dense: Any, conv: Any) -> str:
    """How the CPU's kernels take the packed weight: convolutions, then recurrent steps and products."""
    if np.all((conv or dense)[0]):
        return "as dense"
    words = []
    if conv is not None:
        words.append("convolution: " + ("packed arrays" if conv[1].format in schedule.FKW else "zeros skipped"))
    if dense is not None:
        words.append("recurrent: " + ("blocks" if dense[1].format in recurrent.BSPC else "zeros skipped"))
    return "; ".join(words)


def _compacts(dense: Any, conv: Any) -> str:
    """Which whole channels the set empties: what `compaction.compact` removes, and so what makes an export smaller."""
    z = (conv or dense)[0]
    axes = tuple(range(z.ndim))
    words = [
        name
        for name, axis in (("filters", z.ndim - 1), ("inputs", z.ndim - 2))
        if not np.abs(z).sum(axis=tuple(a for a in axes if a != axis)).all()
    ]
    return " and ".join(words) or "–"


def row(name: str) -> str:
    """The row of a set."""
    dense, conv = (_stored(SETS[name], shape) for shape in (DENSE, CONV))
    cells = (f"`{name}`", _packs(dense), _packs(conv), _compiles(dense, conv), _compacts(dense, conv))
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    """The table as Markdown."""
    lines = [
        "| set | packed, dense `[64, 64]` | packed, convolution `[3, 3, 64, 64]` | compiles (CPU) | compacts |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *map(row, SETS)])


def page(text: str) -> str:
    """The page with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    sys.exit(PAGE.write_text(page(PAGE.read_text())) == 0)
