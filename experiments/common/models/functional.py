"""An NNX module as two pure functions, `init(key)` and `apply(variables, x)`, as drivers and the training take them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx


class Functional(NamedTuple):
    """A network without state beside its parameters.

    Attributes:
      make: makes the module from `nnx.Rngs`.
      graph: what the module is made of, without its arrays.
      state: shapes and dtypes of its parameters, as NNX keeps them.
    """

    make: Callable[[nnx.Rngs], Any]
    graph: Any
    state: Any

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Variables drawn from a key: `{"params": ...}`, plain dictionaries named as the module's attributes."""
        params = jax.jit(lambda k: nnx.to_pure_dict(nnx.state(self.make(nnx.Rngs(k)), nnx.Param)))(key)
        return {"params": params}

    def like(self) -> dict[str, Any]:
        """Shapes and dtypes of the variables."""
        return {"params": nnx.to_pure_dict(self.state)}

    def apply(self, variables: Any, x: jax.Array, train: bool = False) -> jax.Array:
        """The network's outputs; nothing in it depends on `train`."""
        del train
        state = jax.tree.map(lambda leaf: leaf, self.state)
        nnx.replace_by_pure_dict(state, variables["params"])
        out: jax.Array = nnx.merge(self.graph, state)(x)
        return out


def functional(make: Callable[[nnx.Rngs], Any]) -> Functional:
    """Turns a maker of NNX modules, all of whose variables are parameters, into pure functions.

    Raises:
      ValueError: the module has variables that are no parameters (running statistics, say).
    """
    graph, *states = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)
    state, others = states
    if jax.tree.leaves(others):
        raise ValueError(f"the module has variables beside its parameters: {', '.join(map(str, others))}")
    return Functional(make, graph, state)


__all__ = ["Functional", "functional"]
