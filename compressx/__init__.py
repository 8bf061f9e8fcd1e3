"""compressx: a JAX toolkit for researchers who compress neural networks for real hardware.

Transforms      `admm`, `retrain` (optax transforms), `harden`, `check`, `retract`; `resolve` binds rules to leaves
Constraints     a set of weights each, combined with `&`; `support` makes one of your own from a function
Formats         `save_model`, `load_model`, `write_rules`, `read_rules`; `compressx.formats` for single leaves
Execution       `compile`; `compressx.kernels`, `compressx.compaction`, `compressx.crossbar`, `compressx.export`
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

# Names are imported when they are first asked for: what runs inside an enclave is a part of this package, and must not
# load JAX. Type checkers read the imports below; a test holds the two and `__all__` together.
if TYPE_CHECKING:
    from compressx import constraints, schedules, views
    from compressx._admm import admm
    from compressx._admm_state import AdmmState
    from compressx._admm_state import find_state as find_admm_state
    from compressx._admm_state import metrics as admm_metrics
    from compressx._axes_of import axes_of, with_axes
    from compressx._harden import ConstraintViolation, Hardened, check, count_violations, harden, structures
    from compressx._retrain import RetrainState, retract, retrain
    from compressx._retrain import find_state as find_retrain_state
    from compressx.constraints import from_spec
    from compressx.constraints.activations import quantize_activations
    from compressx.constraints.base import (
        LEVEL,
        SIGN,
        SUPPORT,
        TIE,
        Constraint,
        count,
        factory,
        intersection,
        on_leaf,
        support,
        violations,
    )
    from compressx.constraints.bsp import bsp, bsp_columns, bsp_rows
    from compressx.constraints.coupled import coupled_filters
    from compressx.constraints.crossbar_prune import crossbar_aware
    from compressx.constraints.darb import balanced_block_max, bank_balanced, block_max, darb
    from compressx.constraints.library import select_library
    from compressx.constraints.network import network_structure
    from compressx.constraints.pattern import connectivity, pattern, pattern_connectivity
    from compressx.constraints.polarization import polarize
    from compressx.constraints.quantization import quantize
    from compressx.constraints.select import top_k_mask, top_k_masks
    from compressx.constraints.sparsity import (
        block,
        channels,
        columns,
        filters,
        filters_and_columns,
        n_of_m,
        unstructured,
    )
    from compressx.constraints.unification import prune_blocks, unify, unify_and_prune
    from compressx.formats import load_model, read_rules, save_model, write_rules
    from compressx.kernels import Compiled, compile
    from compressx.native.memory import keep_memory
    from compressx.reconstruction.reconstruct import reconstruct
    from compressx.rules import Bound, resolve

_MODULES = (
    *("budget", "capture", "compaction", "constraints", "crossbar", "export", "formats", "kernels"),
    *("reconstruction", "schedules", "testing", "views"),
)
_HOMES = {
    "AdmmState": "compressx._admm_state.AdmmState",
    "admm": "compressx._admm.admm",
    "find_admm_state": "compressx._admm_state.find_state",
    "admm_metrics": "compressx._admm_state.metrics",
    "axes_of": "compressx._axes_of.axes_of",
    "with_axes": "compressx._axes_of.with_axes",
    "ConstraintViolation": "compressx._harden.ConstraintViolation",
    "Hardened": "compressx._harden.Hardened",
    "check": "compressx._harden.check",
    "count_violations": "compressx._harden.count_violations",
    "harden": "compressx._harden.harden",
    "structures": "compressx._harden.structures",
    "RetrainState": "compressx._retrain.RetrainState",
    "retract": "compressx._retrain.retract",
    "retrain": "compressx._retrain.retrain",
    "find_retrain_state": "compressx._retrain.find_state",
    "load_model": "compressx.formats.load_model",
    "read_rules": "compressx.formats.read_rules",
    "save_model": "compressx.formats.save_model",
    "write_rules": "compressx.formats.write_rules",
    "Compiled": "compressx.kernels.Compiled",
    "compile": "compressx.kernels.compile",
    "keep_memory": "compressx.native.memory.keep_memory",
    "reconstruct": "compressx.reconstruction.reconstruct.reconstruct",
    "Bound": "compressx.rules.Bound",
    "resolve": "compressx.rules.resolve",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"compressx.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'compressx' has no attribute {name!r}")
    module, _, attribute = _HOMES.get(name, f"compressx.constraints.{name}").rpartition(".")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


# A literal list, so that type checkers read it.
__all__ = [
    "LEVEL",
    "SIGN",
    "SUPPORT",
    "TIE",
    "AdmmState",
    "Bound",
    "Compiled",
    "Constraint",
    "ConstraintViolation",
    "Hardened",
    "RetrainState",
    "admm",
    "admm_metrics",
    "axes_of",
    "balanced_block_max",
    "bank_balanced",
    "block",
    "block_max",
    "bsp",
    "bsp_columns",
    "bsp_rows",
    "channels",
    "check",
    "columns",
    "compile",
    "connectivity",
    "constraints",
    "count",
    "count_violations",
    "coupled_filters",
    "crossbar_aware",
    "darb",
    "factory",
    "filters",
    "filters_and_columns",
    "find_admm_state",
    "find_retrain_state",
    "from_spec",
    "harden",
    "intersection",
    "keep_memory",
    "load_model",
    "n_of_m",
    "network_structure",
    "on_leaf",
    "pattern",
    "pattern_connectivity",
    "polarize",
    "prune_blocks",
    "quantize",
    "quantize_activations",
    "read_rules",
    "reconstruct",
    "resolve",
    "retract",
    "retrain",
    "save_model",
    "schedules",
    "select_library",
    "structures",
    "support",
    "top_k_mask",
    "top_k_masks",
    "unify",
    "unify_and_prune",
    "unstructured",
    "views",
    "violations",
    "with_axes",
    "write_rules",
]
