"""Crossbar engines: exact simulation of ReRAM and SOT-MRAM arrays, with area, power and throughput.

design, presets   what an engine is: cells, ADC, signs; ISAAC, FORMS 4/8/16, PRIME-like, PUMA-like
    mapping           layers to arrays, pruned rows and columns squeezed out
"""

from compressx.crossbar.design import Adc, Design, Device
from compressx.crossbar.presets import PRESETS, forms, isaac, preset, prime_like, puma_like
