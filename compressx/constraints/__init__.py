"""Sets of weights and their projections, one file per family. A new family is one file and its lines in `KINDS`."""

from collections.abc import Callable, Mapping
from typing import Any

from compressx.constraints.activations import quantize_activations as quantize_activations
from compressx.constraints.base import LEVEL as LEVEL
from compressx.constraints.base import MAX_SETS as MAX_SETS
from compressx.constraints.base import SIGN as SIGN
from compressx.constraints.base import SUPPORT as SUPPORT
from compressx.constraints.base import TIE as TIE
from compressx.constraints.base import Constraint as Constraint
from compressx.constraints.base import count as count
from compressx.constraints.base import factory as factory
from compressx.constraints.base import intersection as intersection
from compressx.constraints.base import on_leaf as on_leaf
from compressx.constraints.base import support as support
from compressx.constraints.base import violations as violations
from compressx.constraints.bsp import bsp, bsp_columns, bsp_rows
from compressx.constraints.coupled import coupled_filters
from compressx.constraints.crossbar_prune import crossbar_aware
from compressx.constraints.darb import balanced_block_max, bank_balanced, block_max, darb
from compressx.constraints.library import select_library as select_library
from compressx.constraints.network import network_structure
from compressx.constraints.pattern import connectivity, pattern, pattern_connectivity
from compressx.constraints.polarization import polarize
from compressx.constraints.quantization import quantize
from compressx.constraints.select import top_k_mask as top_k_mask
from compressx.constraints.select import top_k_masks as top_k_masks
from compressx.constraints.sparsity import block, channels, columns, filters, filters_and_columns, n_of_m, unstructured
from compressx.constraints.spec import brief, check_types, today
from compressx.constraints.unification import prune_blocks, unify, unify_and_prune

# name in a spec -> factory
KINDS: dict[str, Callable[..., Constraint]] = {
    "unstructured": unstructured,
    "n_of_m": n_of_m,
    "block": block,
    "filters": filters,
    "columns": columns,
    "channels": channels,
    "filters_and_columns": filters_and_columns,
    "coupled_filters": coupled_filters,
    "network_structure": network_structure,
    "pattern": pattern,
    "connectivity": connectivity,
    "pattern_connectivity": pattern_connectivity,
    "bsp_columns": bsp_columns,
    "bsp_rows": bsp_rows,
    "bsp": bsp,
    "block_max": block_max,
    "darb": darb,
    "balanced_block_max": balanced_block_max,
    "bank_balanced": bank_balanced,
    "crossbar_aware": crossbar_aware,
    "polarize": polarize,
    "quantize": quantize,
    "unify": unify,
    "prune_blocks": prune_blocks,
    "unify_and_prune": unify_and_prune,
}


def from_spec(spec: Mapping[str, Any]) -> Constraint:
    """The constraint that a spec (as saved in a file) describes; inverse of `Constraint.spec`.

    Args:
      spec: what `Constraint.spec` was, also after a trip through JSON.

    Raises:
      ValueError: the kind is unknown or an argument does not fit it.

    Example:
      >>> spec = compressx.unstructured(0.1).spec
      >>> str(compressx.from_spec(spec))
      'unstructured(density=0.1, scope=leaf)'
    """
    kind = spec.get("kind")
    if kind == "all":
        parts = spec.get("parts")
        if not isinstance(parts, list) or not 1 <= len(parts) <= MAX_SETS:
            raise ValueError(f"an intersection needs a list of 1 to {MAX_SETS} parts, got {brief(parts)}")
        if not all(isinstance(p, Mapping) and p.get("kind") != "all" for p in parts):
            raise ValueError(f"the parts of an intersection must be single sets, got {brief(parts)}")
        return intersection(*(from_spec(p) for p in parts))
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"unknown constraint {brief(kind)}; known: {', '.join(sorted(KINDS))}")
    arguments = today({k: v for k, v in spec.items() if k != "kind"})
    check_types(kind, KINDS[kind], arguments)
    try:
        return KINDS[kind](**arguments)
    except TypeError as error:
        raise ValueError(f"constraint {kind!r} cannot be built from {brief(dict(spec))}: {error}") from None


__all__ = [
    "KINDS",
    "LEVEL",
    "SIGN",
    "SUPPORT",
    "TIE",
    "Constraint",
    "balanced_block_max",
    "bank_balanced",
    "block",
    "block_max",
    "bsp",
    "bsp_columns",
    "bsp_rows",
    "channels",
    "columns",
    "connectivity",
    "count",
    "coupled_filters",
    "crossbar_aware",
    "darb",
    "factory",
    "filters",
    "filters_and_columns",
    "from_spec",
    "intersection",
    "n_of_m",
    "network_structure",
    "on_leaf",
    "pattern",
    "pattern_connectivity",
    "polarize",
    "prune_blocks",
    "quantize",
    "quantize_activations",
    "select_library",
    "support",
    "top_k_mask",
    "top_k_masks",
    "unify",
    "unify_and_prune",
    "unstructured",
    "violations",
]
