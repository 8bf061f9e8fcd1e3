"""Removal of what became useless, for any network: coupled channels, dead channels, smaller arrays.

    small = compaction.compact(model, variables, x)     # outputs unchanged to float tolerance
    groups = compaction.groups(compaction.channels(model, variables, x))

Nothing is typed by hand: which channels belong together is read from the traced program. See `channels` (units and
groups), `dead` (what can go) and `compact` (the smaller network).
"""

from compressx.compaction.channels import Channels, CompactionError, Group, Slot, channels, groups
from compressx.compaction.compact import Compact, compact, cut, smaller
from compressx.compaction.coupling import coupled_rules
from compressx.compaction.dead import Dead, dead

__all__ = [
    "Channels",
    "Compact",
    "CompactionError",
    "Dead",
    "Group",
    "Slot",
    "channels",
    "compact",
    "coupled_rules",
    "cut",
    "dead",
    "groups",
    "smaller",
]
