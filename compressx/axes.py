"""What the axes of a leaf are, said by a rule in words; and the leaf in the layout in which constraints are written.

    "in out"            Flax's dense kernel (the default of two axes)
    "taps taps in out"  Flax's convolution (the default of four axes)
    "out in"            Equinox's and PyTorch's linear layer; "out in taps taps" their convolution
    "in out out"        query, key and value of Flax's attention, `[d, heads, head_dim]`; "in in out" its output
    "stack in out"      a stacked dense layer: `nn.scan` over layers, experts
    "taps taps out out" Keras' depthwise kernel, `[kh, kw, channels, multiplier]`

A leaf is brought to `[stack, taps..., in, out]`: axes of one word are joined in the order in which they are stored, and
an absent input counts as 1. A stacked leaf is as many leaves as its stack is long, each with a structure of its own.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

from compressx.constraints.base import Constraint

WORDS = ("stack", "taps", "in", "out")
# Sets of single weights, to which it is of no account what the axes are, and sets that name the axes of each leaf.
_FREE = ("unstructured", "coupled_filters", "network_structure")
DEFAULTS = {2: ("in", "out"), 4: ("taps", "taps", "in", "out")}


class Axes(NamedTuple):
    """The words of a rule, one for each axis of its leaves."""

    words: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        return "stack" in self.words

    def __str__(self) -> str:
        return " ".join(self.words)

    def fits(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless there is a word for each axis of a shape."""
        if len(shape) != len(self.words):
            raise ValueError(f"axes {str(self)!r} are {len(self.words)} words, the leaf {shape} has {len(shape)} axes")

    def to(self, w: Any) -> Array:
        """The leaf as `[stack, taps..., in, out]`, without a stack where there is none."""
        shape = tuple(w.shape)
        moved = w.transpose(self._order())
        return moved.reshape(self._canonical(shape))

    def back(self, x: Any, shape: tuple[int, ...]) -> Array:
        """Inverse of `to`, for a leaf of this shape."""
        order = self._order()
        inverse = [order.index(i) for i in range(len(order))]
        back: Array = x.reshape([shape[i] for i in order]).transpose(inverse)
        return back

    def _order(self) -> list[int]:
        return [i for word in WORDS for i, w in enumerate(self.words) if w == word]

    def _canonical(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        def sizes(word: str) -> list[int]:
            return [n for n, w in zip(shape, self.words, strict=True) if w == word]

        stack = [math.prod(sizes("stack"))] if self.stacked else []
        taps = sizes("taps")
        if not taps and "in" not in self.words:  # a vector of outputs
            return (*stack, math.prod(sizes("out")))
        return (*stack, *taps, math.prod(sizes("in")), math.prod(sizes("out")))


def parse(given: Any) -> Axes | None:
    """The axes that a rule says, as a string of words or a sequence of them; None stays None.

    Raises:
      ValueError: a word is none of stack, taps, in, out.
    """
    if given is None or isinstance(given, Axes):
        return given
    words = tuple(given.split()) if isinstance(given, str) else tuple(given)
    odd = [w for w in words if w not in WORDS]
    if odd or not words:
        raise ValueError(f"axes are words out of {', '.join(WORDS)}, one for each axis of the leaf; got {given!r}")
    return Axes(words)


def guessed(constraint: Constraint, shape: tuple[int, ...]) -> str | None:
    """Why a set cannot apply to a leaf whose axes nobody has said, or None: nothing structured is done to a guess."""
    if len(shape) < 3 or len(shape) in DEFAULTS:
        return None
    structured = [s for s in constraint.sets if s.spec["kind"] not in _FREE and s.spec.get("per") != "tensor"]
    if not structured:
        return None
    return (
        f"{structured[0]} needs to know what the {len(shape)} axes are: say it in the rule, "
        '(pattern, constraint, "stack in out") for stacked layers, "in out out" for a query kernel, "taps in out" for '
        "a convolution over one axis"
    )


def over_stack(constraint: Constraint) -> Constraint:
    """The set on every slice of a stack by itself: its functions mapped over axis 0 of weights and structures.

    Raises:
      ValueError: the set holds over several leaves together.
    """
    if constraint.joint:
        raise ValueError(f"{constraint} holds over several leaves together, which cannot be stacked")
    if constraint.parts:
        parts = tuple(map(over_stack, constraint.parts))
        return _mapped(constraint)._replace(parts=parts, slice=constraint)
    return _mapped(constraint)._replace(slice=constraint)


def _mapped(constraint: Constraint) -> Constraint:
    def each(function: Callable[..., Any] | None) -> Callable[..., Any] | None:
        return None if function is None else jax.vmap(function)

    mapped: dict[str, Any] = {
        name: each(getattr(constraint, name))
        for name in ("init", "project", "refresh", "freeze", "retract", "settle", "moved")
    }
    changed = constraint.changed
    if changed is not None:
        mapped["changed"] = lambda w, before, after: jax.vmap(changed)(w, before, after).mean()
    return constraint._replace(**mapped)
