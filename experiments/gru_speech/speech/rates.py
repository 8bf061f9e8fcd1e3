"""How many weights each matrix of a recurrent network keeps at a given overall rate, and as which sets.

RTMobile's rate is all weights of the gate matrices over the non-zero ones; biases and the output layer are not counted.
A matrix `[in, out]` under BSP keeps r outputs (the paper's rows) and, in each of its strips of outputs, c inputs (the
paper's columns): r * c weights.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

# The released models: rate -> the rate of the rows step, from its printed prune ratio 1 - 1 / rate. The columns step
# makes up the rest; the 10x model fits the rows step alone.
ROW_RATES = {10: 10.0, 20: 5.0, 29: 2.0, 80: 5.0, 94: 10.0, 103: 8.0, 245: 16.0, 301: 20.0}
# Released logs: rate -> (exact rate, phone error rate on TIMIT's core test set).
RELEASED = {
    10: (9.95, 0.188),
    20: (20.34, 0.195),
    29: (28.91, 0.196),
    80: (79.50, 0.215),
    94: (93.87, 0.217),
    103: (103.84, 0.232),
    245: (245.59, 0.242),
    301: (301.28, 0.255),
}
STRUCTURES = (
    *("bsp", "unstructured", "block", "unified", "rows", "columns", "coarse"),
    *("bsp_columns", "bsp_rows", "bsp_tiles"),
)
Shapes = Mapping[str, tuple[int, int]]
Rules = tuple[tuple[str, dict[str, Any]], ...]


class Keep(NamedTuple):
    """What a matrix keeps under BSP: c columns in every strip, r rows."""

    columns: int
    rows: int

    @property
    def weights(self) -> int:
        """r * c."""
        return self.columns * self.rows


def budgets(shapes: Shapes, rate: float, row_rate: float) -> dict[str, Keep]:
    """Columns and rows of every matrix so that all keep at most floor(weights / rate) together, and nearly as many.

    Rows are out / row_rate, columns what the rate then leaves, each at least 1; where row_rate is the whole rate all
    columns stay, and BSP has only its second step. What rounding leaves of the budget goes
    column by column (row by row where all columns are kept) to the matrix of lowest density that it fits.

    Raises:
      ValueError: the rates are impossible, or not even one weight a matrix fits.
    """
    total = sum(a * b for a, b in shapes.values())
    limit = math.floor(total / rate) if rate >= 1 else 0
    if not 1 <= row_rate <= rate or limit < len(shapes):
        raise ValueError(
            f"rate={rate} with row_rate={row_rate} is impossible for {total} weights in {len(shapes)} matrices; "
            "1 <= row_rate <= rate, and every matrix keeps a weight"
        )
    keep = {}
    for name, (inputs, outputs) in shapes.items():
        if row_rate == rate:
            keep[name] = Keep(inputs, max(1, math.floor(outputs / rate)))
        else:
            rows = max(1, math.floor(outputs / row_rate + 0.5))
            keep[name] = Keep(min(inputs, max(1, math.floor(inputs * outputs / (rate * rows)))), rows)
    while (spent := sum(k.weights for k in keep.values())) > limit:  # small matrices at high rates: one column is much
        dense = max((n for n in keep if keep[n].rows > 1), key=lambda n: keep[n].weights / math.prod(shapes[n]))
        keep[dense] = keep[dense]._replace(rows=keep[dense].rows - 1)
    while True:
        grown = {}
        for name, k in keep.items():
            whole = k.columns == shapes[name][0]
            more = k._replace(rows=k.rows + 1) if whole else k._replace(columns=k.columns + 1)
            if more.rows <= shapes[name][1] and spent + more.weights - k.weights <= limit:
                grown[name] = more
        if not grown:
            return keep
        name = min(grown, key=lambda n: keep[n].weights / math.prod(shapes[n]))
        spent += grown[name].weights - keep[name].weights
        keep[name] = grown[name]


def columns_first(shapes: Shapes, keep: Mapping[str, Keep]) -> bool:
    """Whether BSP's first step prunes anything."""
    return any(keep[n].columns < shapes[n][0] for n in shapes)


def rules(
    structure: str, shapes: Shapes, keep: Mapping[str, Keep], strips: int = 4, block: int = 4
) -> tuple[Rules, ...]:
    """The rules of every stage, one stage but for BSP with both its steps.

    All structures keep r * c weights of a matrix, or as near as whole blocks, rows or columns come (at least one):

        bsp            step 1, c columns in each strip; step 2, r rows of what is left
        unstructured   single weights
        block          blocks of block x block
        unified        the same, and nine tenths of those that are left have a single magnitude each
        rows, columns  whole rows (outputs) or whole columns (inputs) of the matrix
        coarse         r whole rows and c whole columns: a smaller dense matrix
        bsp_tiles      step 2 chooses r rows in each strip of inputs, not in the whole matrix
        bsp_columns    step 1 alone: the ablation; bsp_rows: bsp_tiles' step 2 alone (bsp's own is "rows")

    Raises:
      ValueError: no such structure.
    """

    def near(weights: int, each: int, most: int) -> int:
        return min(most, max(1, math.floor(weights / each + 0.5)))

    def spec(name: str) -> dict[str, Any]:
        (inputs, outputs), k = shapes[name], keep[name]
        if structure in ("bsp", "bsp_tiles"):
            tiles = {"row_strips": strips} if structure == "bsp_tiles" else {}
            return {
                "kind": "bsp",
                "keep_columns": k.columns,
                "keep_rows": k.rows,
                "column_strips": strips,
                **tiles,
            }
        if structure == "unstructured":
            return {"kind": "unstructured", "keep": k.weights}
        if structure in ("block", "unified"):
            blocks = math.ceil(inputs / block) * math.ceil(outputs / block)
            left = near(k.weights, block * block, blocks)
            if structure == "block":
                return {"kind": "block", "block": [block, block], "keep": left}
            shares = {"unify_fraction": 0.9 * left / blocks, "prune_fraction": 1 - left / blocks}
            return {"kind": "unify_and_prune", "block": [block, block], **shares}
        if structure == "rows":
            return {"kind": "filters", "keep": near(k.weights, inputs, outputs)}
        if structure == "columns":
            return {"kind": "columns", "keep": near(k.weights, outputs, inputs)}
        if structure == "coarse":
            return {"kind": "filters_and_columns", "keep_columns": k.columns, "keep_filters": k.rows}
        if structure == "bsp_columns":
            return {"kind": "bsp_columns", "keep": near(k.weights, outputs, inputs), "strips": strips}
        return {"kind": "bsp_rows", "keep": near(k.weights, inputs, outputs), "strips": strips}

    if structure not in STRUCTURES:
        raise ValueError(f"structure={structure!r} is impossible; it must be one of {', '.join(STRUCTURES)}")
    last = tuple((name, spec(name)) for name in shapes)
    if structure in ("bsp", "bsp_tiles") and columns_first(shapes, keep):
        first = tuple((n, {"kind": "bsp_columns", "keep": keep[n].columns, "strips": strips}) for n in shapes)
        return first, last
    return (last,)
