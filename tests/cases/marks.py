"""Marks of cases: which are still open and how they fail, and which need native kernels."""

from typing import Any

import pytest


def open_case(*, raises: type[BaseException], match: str) -> Any:
    """Marks a case that is not right yet: it must fail, with this exception and a text in which `match` is found.

    A case that passes fails the suite (remove its mark), and so does one that fails in another way: an exception of
    another type, of a subtype, or with another text.

    Args:
      raises: the type of the exception, exactly.
      match: a regular expression, searched in the exception's text.
    """
    expected = pytest.RaisesExc(raises, match=match, check=lambda error: type(error) is raises)
    return pytest.mark.xfail(strict=True, raises=expected, reason=f"{raises.__name__}: {match}")
