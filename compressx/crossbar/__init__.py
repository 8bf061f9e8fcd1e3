"""Crossbar engines: exact simulation of ReRAM and SOT-MRAM arrays, with area, power and throughput.

design, presets   what an engine is: cells, ADC, signs; ISAAC, FORMS 4/8/16, PRIME-like, PUMA-like
mapping           layers to arrays, pruned rows and columns compacted
reference         the definition of an engine's product, one conversion at a time
cells, adc        weights as cells; sums as codes
arrays            weights laid on arrays; what cannot clip is proven
kernels, mvm      the product's formulations, and the one call that picks
tune              which formulation is fastest on this device
program           `program.program`: arrays for the formulation that is picked
layers, network   dense and convolution layers; whole flax models on simulated hardware
recurrent         what a recurrent layer offers so that its products can be simulated
aware             noise-aware training
zero_skip         effective input cycles
noise, ir_drop    devices that are not ideal, Monte Carlo; wire resistance
chips, scaling    parts of published chips; how they follow a design
cost, energy      frames per second, latency; energy by layer and component
products          products of two activations, which no array computes
sot_mram          bit planes, AND and population count in SOT-MRAM
"""

from compressx.crossbar.arrays import Programmed, rows_of
from compressx.crossbar.aware import Target, train_matmul, training_hardware
from compressx.crossbar.chips import CHIPS, Chip, Part, forms_chip, isaac_chip, known_inconsistencies
from compressx.crossbar.cost import Plan, compare, peak_gops, plan
from compressx.crossbar.design import Adc, Design, Device
from compressx.crossbar.energy import layer_energy
from compressx.crossbar.ir_drop import effective_conductance, with_wires
from compressx.crossbar.layers import Deployed, calibrate, deploy, hardware, simulate
from compressx.crossbar.mapping import (
    Layer,
    Mapped,
    Reduction,
    conv_layer,
    dense_layer,
    map_layer,
    map_network,
    occupancy,
    recurrent_layers,
    reduction,
)
from compressx.crossbar.mvm import Saturation, crossbar_matmul, crossbar_parts, saturation
from compressx.crossbar.noise import Estimate, Variation, monte_carlo, perturb
from compressx.crossbar.presets import PRESETS, forms, isaac, preset, prime_like, puma_like
from compressx.crossbar.scaling import adc_law, fitted
from compressx.crossbar.sot_mram import Engine, and_popcount_matmul
from compressx.crossbar.zero_skip import Skipping, effective_cycles
