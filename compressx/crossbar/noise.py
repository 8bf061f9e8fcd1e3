"""Non-idealities of cells and converters, and Monte Carlo over devices.

A cell of level c in 0..top conducts, in cell units (one unit = one level step of an ideal cell):

    g0 = c * (1 - 1/r) + top / r                  on/off ratio r: the lowest level leaks top / r
    g1 = g0 * exp(N(0, s^2))  or  max(0, g0 + s * top * N(0, 1))  programming variation, log-normal or Gaussian
    g2 = g1 * (t / t0)^(-nu),  nu = N(mean, spread^2), at least 0                 drift
    g3 = top where stuck on, top / r where stuck off                              faults

and the known leak top / r of the rows driven is subtracted, so that the mean error of an ideal cell is 0 and levels are
spread by (1 - 1/r). No cell conducts less than nothing: Gaussian spread makes cells near 0 conduct more in the mean.

The order is leak, then wires (`ir_drop.with_wires`), then the reference: the leak that is subtracted is that of cells
without wires, known beforehand. Differential cells are two devices, each with its own draw. Column sums
then pass an ADC with a gain and an offset error of its own, and each conversion may add read noise. A device is drawn
once per key (`perturb`); read noise at every conversion.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import stats

from compressx.crossbar.arrays import Programmed, with_cells
from compressx.crossbar.design import Design


@dataclass(frozen=True)
class Variation:
    """How cells and converters differ from ideal ones; the default is ideal.

    Attributes:
      kind: "lognormal" (a factor exp(N(0, sigma^2)); FORMS: sigma 0.1) or "gaussian" (added, in shares of the range).
      sigma: its standard deviation, at least 0.
      read_noise: standard deviation of a column's sum at each conversion, in cell units.
      drift_time: t / t0, at least 1.
      drift_mean, drift_spread: of the exponent nu.
      stuck_on, stuck_off: shares of cells.
      on_off: r_off / r_on, above 1; None: that of `design.device`, infinite where it states no resistances.
      adc_gain, adc_offset: standard deviations of each column's ADC: of the gain around 1, and of the offset in cell
        units.

    Raises:
      ValueError: a field is out of range; the message names it.

    Source: log-normal variation with sigma 0.1: G. Yuan et al., "FORMS", 2021, evaluation.

    Example:
      >>> compressx.crossbar.Variation(sigma=0.1, stuck_off=0.01).kind
      'lognormal'
    """

    kind: str = "lognormal"
    sigma: float = 0.0
    read_noise: float = 0.0
    drift_time: float = 1.0
    drift_mean: float = 0.0
    drift_spread: float = 0.0
    stuck_on: float = 0.0
    stuck_off: float = 0.0
    on_off: float | None = None
    adc_gain: float = 0.0
    adc_offset: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("lognormal", "gaussian"):
            raise ValueError(f'kind must be "lognormal" or "gaussian", got {self.kind!r}')
        for name in ("sigma", "read_noise", "drift_spread", "stuck_on", "stuck_off", "adc_gain", "adc_offset"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.stuck_on + self.stuck_off > 1:
            raise ValueError(f"stuck_on + stuck_off is a share of all cells, got {self.stuck_on + self.stuck_off}")
        if not self.drift_time >= 1:
            raise ValueError(f"drift_time is t / t0, at least 1, got {self.drift_time}")
        if self.on_off is not None and not self.on_off > 1:
            raise ValueError(f"on_off must be above 1 (None: infinite), got {self.on_off}")


def leak_of(variation: Variation, design: Design) -> float:
    """What a cell at the lowest level conducts, in cell units: top / r, by the variation or else by the device."""
    device, ratio = design.device, variation.on_off
    if ratio is None and device.r_on is not None and device.r_off is not None:
        ratio = device.r_off / device.r_on
    return 0.0 if ratio is None else device.top / ratio


def conductance(key: Array, levels: Array, variation: Variation, top: int, leak: float | None = None) -> Array:
    """One draw of the conductances of cells, in cell units, the known leak subtracted: float32 of the levels' shape.

    Args:
      key: of the draw.
      levels: 0..top, integers; floats for a gradient with respect to them.
      variation: what is drawn.
      top: the highest level.
      leak: of the lowest level; None: top / `variation.on_off`.
    """
    v = variation
    if leak is None:
        leak = 0.0 if v.on_off is None else top / v.on_off
    programmed, drifted, stuck = jax.random.split(key, 3)
    g = levels.astype(jnp.float32) * (1.0 - leak / top) + leak
    if v.sigma:
        z = jax.random.normal(programmed, g.shape, jnp.float32)
        g = g * jnp.exp(v.sigma * z) if v.kind == "lognormal" else jnp.maximum(g + (v.sigma * top) * z, 0.0)
    if v.drift_time > 1 and (v.drift_mean or v.drift_spread):
        nu = jnp.maximum(v.drift_mean + v.drift_spread * jax.random.normal(drifted, g.shape, jnp.float32), 0.0)
        g = g * jnp.exp(-nu * float(np.log(v.drift_time)))
    if v.stuck_on or v.stuck_off:
        u = jax.random.uniform(stuck, g.shape, jnp.float32)
        g = jnp.where(u < v.stuck_on, float(top), jnp.where(u > 1.0 - v.stuck_off, leak, g))
    return g - leak


def perturb(key: Array, programmed: Programmed, variation: Variation) -> Programmed:
    """The same weights on one draw of devices and converters; jit and vmap over keys.

    Args:
      key: one device per key.
      programmed: ideal arrays from `program(..., prove=False)`.
      variation: what is drawn. With analog pairs a level's two cells (one of them 0) are drawn apart.

    Returns:
      `Programmed` with float32 cells, and gain, offset and read noise where the variation has them.

    Raises:
      ValueError: columns of `programmed` are proven, so that their cells were not kept.

    Source: log-normal variation: G. Yuan et al., "FORMS", 2021; drift (t / t0)^-nu of phase-change memory as in V.
    Joshi et al., 2020.

    Example:
      >>> from compressx import crossbar
      >>> from compressx.crossbar.program import program
      >>> arrays = program([[3]], crossbar.Design(rows=1, active_rows=1, weight_bits=2, signs="polarized"), prove=False)
      >>> device = crossbar.perturb(jax.random.key(0), arrays, crossbar.Variation(on_off=3.0))
      >>> float(device.cells.cells[0, 0, 0, 0])  # levels 0..3 are spread by 1 - 1/3, the leak subtracted
      2.0
    """
    levels, design = programmed.cells.cells, programmed.design
    cells, converters = jax.random.split(key)
    top, leak = design.device.top, leak_of(variation, design)
    if design.signed_sums:
        plus, minus = jax.random.split(cells)
        g = conductance(plus, jnp.maximum(levels, 0), variation, top, leak)
        g = g - conductance(minus, jnp.maximum(-levels, 0), variation, top, leak)
    else:
        g = conductance(cells, levels, variation, top, leak)
    groups, rows, columns, filters = levels.shape
    g = jnp.where(programmed.driven[:, :, None, None], g, 0.0)
    gain = shift = None
    if variation.adc_gain or variation.adc_offset:
        first, second = jax.random.split(converters)
        shape = (groups, columns, filters)
        gain = 1.0 + variation.adc_gain * jax.random.normal(first, shape, jnp.float32)
        shift = variation.adc_offset * jax.random.normal(second, shape, jnp.float32)
    return with_cells(programmed, g, gain=gain, shift=shift, read_noise=variation.read_noise, leak=leak)


class Estimate(NamedTuple):
    """What many devices give.

    Attributes:
      values: float64 `[n]`, the metric of each device.
      mean, std: of the values (std with n - 1).
      low, high: confidence interval of the mean (Student's t).
      level: its confidence.

    Example:
      >>> found = compressx.crossbar.monte_carlo(jax.random.uniform, jax.random.key(0), count=4)
      >>> found.values.shape, bool(found.low < found.mean < found.high)
      ((4,), True)
    """

    values: np.ndarray
    mean: float
    std: float
    low: float
    high: float
    level: float


def monte_carlo(
    metric: Callable[[Array], Array], key: Array, count: int, batch: int = 8, level: float = 0.95
) -> Estimate:
    """A metric over many devices: `metric(key) -> scalar`, vmapped over `count` keys, `batch` at a time.

        mean +- t_{(1 + level)/2, n - 1} * std / sqrt(n)

    `metric` draws its device from the key, as in `lambda k: accuracy(perturb(k, programmed, variation))`.

    Args:
      metric: `key -> []`, a number for the device drawn from the key; it is traced.
      key: all devices are drawn from it.
      count: devices, at least 2.
      batch: devices that are simulated together.
      level: confidence of the interval, in (0, 1).

    Returns:
      `Estimate`: all values, their mean and its confidence interval.

    Raises:
      ValueError: count or level is out of range, or the metric gives more than one number.

    Example:
      >>> from compressx import crossbar
      >>> found = crossbar.monte_carlo(lambda key: jnp.float32(0.9), jax.random.key(0), count=4)
      >>> round(found.mean, 3), found.std, found.level
      (0.9, 0.0, 0.95)
    """
    if count < 2:
        raise ValueError(f"an interval needs at least 2 devices, got count={count}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    keys = jax.random.split(key, count)
    values = np.asarray(jax.jit(lambda k: jax.lax.map(metric, k, batch_size=batch))(keys), np.float64)
    if values.shape != (count,):
        raise ValueError(f"metric must give one number, it gives shape {values.shape[1:]}")
    mean, std = float(values.mean()), float(values.std(ddof=1))
    half = float(stats.t.ppf((1 + level) / 2, count - 1)) * std / count**0.5
    return Estimate(values, mean, std, mean - half, mean + half, level)
