"""Tables of which `make test` runs a few rows, one of each kind, and `make test-all` every one."""

from collections.abc import Iterable
from typing import Any

import pytest


def some(quick: Iterable[Any], rows: Iterable[Any]) -> list[Any]:
    """The rows for `pytest.mark.parametrize`: all but the quick ones are slow tests."""
    quick, rows = list(quick), list(rows)
    assert all(row in rows for row in quick), f"no such row: {[row for row in quick if row not in rows]}"
    return [
        row if row in quick else pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=pytest.mark.slow)
        for row in rows
    ]
