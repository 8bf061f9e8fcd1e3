"""Recurrent layers: a layer with weights of its own says how its products can be done by something else.

`nn.Dense` and `nn.Conv` are recognised by their type. A recurrent layer multiplies inside a loop over time, so it has a
method `run_with(product, ...)` that computes the layer with every product of a weight made by `product`, one step at a
time; `models.GRULayer` and `models.LSTM` do.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeGuard

import flax.linen as nn
from jax import Array

Product = Callable[[Array, str, Array], Array]


class Recurrent(Protocol):
    """A flax module whose products with its own matrices can be made elsewhere."""

    path: tuple[str, ...]

    def run_with(self, product: Product, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Array]]:
        """The module's `__call__` with `product(x, name, w)` in place of each `x @ w`.

        Args:
          product: `[..., in], name, [in, out] -> [..., out]`; the name is the matrix's path below the module, without
            `kernel`. It may be traced inside `lax.scan`.
          args, kwargs: of `__call__`.

        Returns:
          What `__call__` gives, and what each matrix was multiplied with: name -> `[..., in]`, all steps.
        """


def is_recurrent(module: nn.Module) -> TypeGuard[Recurrent]:
    """Whether the module has `run_with`."""
    return hasattr(type(module), "run_with")  # of the type: asking a bound module would set it up


def plain(x: Array, name: str, w: Array) -> Array:
    """The product as the network itself makes it."""
    del name
    return x @ w


def path_of(module: Recurrent, name: str) -> str:
    """The path of a matrix in the whole model."""
    return "/".join((*module.path, name))
