"""Trees of a saved model: nested dictionaries from paths, and the form of a tree of the reader's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressx.rules import Bound, resolve
from compressx.tree import Key, path_name, paths

MAX_LEAVES = 8192
MAX_DEPTH = 64
MAX_NAME = 1024


def nest(keyed: Sequence[Sequence[Key]], leaves: Sequence[Any] | None = None) -> dict[Key, Any]:
    """Nested dictionaries, a level for each key of a path; refuses what would not come back as it was."""
    tree: dict[Key, Any] = {}
    if len(keyed) > MAX_LEAVES:
        raise ValueError(f"{len(keyed)} leaves, more than {MAX_LEAVES}")
    seen: set[str] = set()
    for i, path in enumerate(keyed):
        name = path_name(path)
        if not name or len(name) > MAX_NAME or len(path) > MAX_DEPTH or not name.isprintable():
            raise ValueError(f"the path {name[:80]!r} is empty, not printable, too long or too deep")
        if name in seen:
            raise ValueError(f"the path {name!r} names two leaves, or a leaf and a branch")
        seen.add(name)
        node = tree
        for number, key in enumerate(path):
            if any(type(other) is not type(key) for other in node):
                raise ValueError(f"the path {name!r} has a number where another leaf has a name")
            if number + 1 == len(path):
                if key in node:
                    raise ValueError(f"the path {name!r} names two leaves, or a leaf and a branch")
                node[key] = leaves[i] if leaves is not None else None
            else:
                node = node.setdefault(key, {})
                if not isinstance(node, dict):
                    raise ValueError(f"the path {name!r} runs through another leaf")
    return tree


def in_the_form_of(
    like: Any, params: Any, rules: Sequence[Any], bound: Sequence[Bound], target: Path
) -> tuple[Any, tuple[Bound, ...]]:
    """The params of a file in the form of another tree, matched by path, and the rules bound to that."""
    held = dict(zip(paths(params), jax.tree.leaves(params), strict=True))
    leaves, treedef = jax.tree.flatten(like)
    wanted = dict(zip(paths(like), leaves, strict=True))
    numbers = {p: x for p, x in wanted.items() if isinstance(x, bool | int | float | complex)}
    weights = numbers | {
        p: x for p, x in wanted.items() if hasattr(x, "dtype") and not jnp.issubdtype(x.dtype, jax.dtypes.extended)
    }
    if weights.keys() != held.keys():
        absent, more = (
            ", ".join(sorted(a - b)[:4]) for a, b in ((weights.keys(), held), (held.keys(), weights.keys()))
        )
        raise ValueError(
            f"{target}: its leaves are not those of the tree given as like: absent {absent or 'none'}, "
            f"beyond it {more or 'none'}"
        )
    for path, x in weights.items():
        if path in numbers and held[path].shape == ():
            held[path] = type(x)(held[path].item())
        elif path in numbers or (tuple(x.shape), np.dtype(x.dtype)) != (held[path].shape, held[path].dtype):
            raise ValueError(
                f"{target}: {path} is {held[path].dtype} {list(held[path].shape)} in the file, "
                f"{getattr(x, 'dtype', type(x).__name__)} {list(np.shape(x))} in the tree given as like"
            )
    out = jax.tree.unflatten(treedef, [held.get(p, x) for p, x in wanted.items()])
    again = resolve(rules, out) if rules else ()
    for b, before in zip(again, bound, strict=True):
        if b.paths != before.paths:
            raise ValueError(f"{target}: the leaves of {b.name} come in another order in the tree given as like")
    return out, again
