"""The pattern libraries of a run: where they are, and what is logged of them while they are extracted."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from compressx._admm_state import AdmmState
from compressx.constraints.library_use import use_of
from compressx.constraints.pattern import Patterns
from compressx.rules import Bound, Rules, resolve


def libraries(
    params: Any, rules: Rules, structure: Mapping[str, Any]
) -> Iterator[tuple[Bound, Mapping[str, Any], Patterns]]:
    """The sets with a pattern library: what they apply to, their spec, and the library.

    Args:
      params: any pytree of arrays or shapes.
      rules: (pattern, constraint) pairs.
      structure: the structure of the sets, as `harden.structures` gives it.
    """
    for b in resolve(rules, params):
        for part, s in b.constraint.each(structure[b.name]):
            if isinstance(s, Patterns) and len(s.masks):
                yield b, part.spec, s


def rounds(params: Any, rules: Rules, admm: AdmmState) -> dict[str, dict[str, float]]:
    """Of every library by name: its size, the entropy of its use in bits, and the share of its 8 most used masks."""
    leaves = jax.tree.leaves(params)
    out: dict[str, dict[str, float]] = {}
    for b, _, s in libraries(params, rules, admm.structure):
        use = use_of([leaves[i] for i in b.indices], s.masks, s.live)
        out.setdefault("library_size", {})[b.name] = len(use.masks)
        out.setdefault("library_entropy", {})[b.name] = use.entropy
        out.setdefault("library_top8", {})[b.name] = use.coverage[8]
    return out
