"""The cases run as a user's code does: under jax's own promotion, and with warnings that are shown and not raised.

The suite's strict promotion would fail six of them in their own lines.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

_FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets the cases warn: what is wrong may be said in a warning, and then the case goes on."""
    for item in items:
        if item.path.parent == _FOLDER:
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True)
def default_promotion() -> Iterator[None]:
    """Promotes dtypes and ranks as jax does unless told otherwise."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
