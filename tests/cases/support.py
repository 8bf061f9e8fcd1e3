"""What the cases share besides the API: random arrays, and the exceptions of calls that may be refused."""

from collections.abc import Callable
from typing import Any

import jax


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """Standard normal numbers, float32."""
    return jax.random.normal(jax.random.key(seed), shape)


def raised_by(call: Callable[[], Any], kind: type[Exception] = Exception) -> Exception | None:
    """The exception of this kind with which a call ends; None where it returns. Any other exception passes through."""
    try:
        call()
    except kind as error:
        return error
    return None
