"""An estimate of a device's time and energy from its published peaks: arithmetic, no measurement."""

from collections.abc import Sequence
from typing import NamedTuple

from compressx.compaction.cost import LayerCost


class Device(NamedTuple):
    """Published peaks.

    Attributes:
      name: of the device.
      macs: multiply-adds a second, in float32.
      bandwidth: bytes a second to its memory.
      watts: of the whole module, in the power mode in which it reaches these peaks.
      source: where the figures stand.
    """

    name: str
    macs: float
    bandwidth: float
    watts: float
    source: str


JETSON_TX2 = Device(
    name="Jetson TX2",
    macs=256 * 1.302e9,  # 256 Pascal cores, a fused multiply-add a cycle each
    bandwidth=59.7e9,
    watts=15.0,
    source="NVIDIA Jetson TX2 data sheet: 256 Pascal cores at 1.30 GHz, 59.7 GB/s LPDDR4, 15 W in Max-P",
)


class Estimate(NamedTuple):
    """A bound from below on time, hence from above on what depends on it.

    Attributes:
      seconds: for one image, every layer at whichever peak holds it up.
      frames: images a second.
      joules: an image, at the device's full power.
      bound_by_memory: share of the time in which memory is the limit.
    """

    seconds: float
    frames: float
    joules: float
    bound_by_memory: float


def estimate(layers: Sequence[LayerCost], device: Device = JETSON_TX2) -> Estimate:
    """The roofline of a network: the sum over layers of max(macs / peak, bytes / bandwidth).

    No real kernel reaches the peaks, small layers least of all: an estimate, to compare networks with, and labelled so
    wherever it is shown.

    Source: Williams, Waterman, Patterson, "Roofline", 2009.
    """
    arithmetic = [c.macs / device.macs for c in layers]
    memory = [c.bytes / device.bandwidth for c in layers]
    total = sum(max(a, m) for a, m in zip(arithmetic, memory, strict=True))
    waiting = sum(m for a, m in zip(arithmetic, memory, strict=True) if m > a)
    return Estimate(total, 1 / total, total * device.watts, waiting / total)
