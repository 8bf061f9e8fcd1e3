"""Arguments from a spec: they may come from anybody's file, and must be of the types that a factory declares."""

import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_MOST = 2**63 - 1


def check_types(kind: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for an argument whose value has another type than the factory declares.

    A bool or a string is no number, a number is finite and an integer fits 64 bits; JSON's lists stand for tuples too.
    """
    declared = inspect.signature(factory).parameters
    for name, value in arguments.items():
        if name in declared and not fits(value, declared[name].annotation):
            expected = inspect.formatannotation(declared[name].annotation).replace("collections.abc.", "")
            raise ValueError(f"{kind}: {name}={brief(value)} is not of the type {expected}")


_SCOPES = {"global": "rule", "network": "rule", "apart": "leaf", "together": "rule"}


def today(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a spec that release 0.1 wrote, by today's names; those of today as they are."""
    given = dict(arguments)
    if "gates" in given and "scope" not in given:
        given["scope"] = given.pop("gates")
    if isinstance(given.get("scope"), str):
        given["scope"] = _SCOPES.get(given["scope"], given["scope"])
    return given


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has a type, as annotations name it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, h) for h in inner)
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(inner) and all(map(fits, value, inner))
    if origin is Sequence:
        return isinstance(value, list | tuple) and all(fits(v, inner[0]) for v in value)
    if hint is Any:
        return True
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and abs(int(value)) <= _MOST
    if hint is float:
        return fits(value, int) or (isinstance(value, numbers.Real) and not isinstance(value, bool) and _finite(value))
    return isinstance(value, origin or hint)


def _finite(value: numbers.Real) -> bool:
    return not isinstance(value, numbers.Integral) and math.isfinite(value)


def brief(value: Any) -> str:
    """A value as it is written, its beginning where it is long."""
    words = repr(value)
    return words if len(words) <= 200 else f"{words[:200]}..."
