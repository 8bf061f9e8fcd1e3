"""Removal of what became useless, for any network: coupled channels, dead channels, smaller arrays.

    small = compaction.compact(model, variables, x)     # outputs unchanged to float tolerance
    groups = compaction.groups(compaction.channels(model, variables, x))

Nothing is typed by hand: which channels belong together is read from the traced program. See `channels` (units),
`groups`, `dead` (what can go), `compact` (the smaller network), `stored` (in a file and back), `structure` (how much
stays at a rate), `gathered` (kernels with unused positions) and `cost` (weights, multiply-adds and bytes by layer).
"""

from compressx.compaction.channels import Channels, CompactionError, Scope, channels
from compressx.compaction.compact import Compact, NothingRemoved, compact, cut, smaller
from compressx.compaction.cost import LayerCost, costs, peak_bytes
from compressx.compaction.coupling import coupled_rules
from compressx.compaction.dead import Dead, dead
from compressx.compaction.gathered import gather, gathered_conv
from compressx.compaction.groups import Group, Slot, groups
from compressx.compaction.stored import removed, restore
from compressx.compaction.structure import Amounts, amounts, kernels, structure_rules

__all__ = [
    "Amounts",
    "Channels",
    "Compact",
    "CompactionError",
    "Dead",
    "Group",
    "LayerCost",
    "NothingRemoved",
    "Scope",
    "Slot",
    "amounts",
    "channels",
    "compact",
    "costs",
    "coupled_rules",
    "cut",
    "dead",
    "gather",
    "gathered_conv",
    "groups",
    "kernels",
    "peak_bytes",
    "removed",
    "restore",
    "smaller",
    "structure_rules",
]
