"""Execution of compressed networks: fast kernels that run the storage formats, each beside its definition.

    f = kernels.compile(model, load_model("compressed.safetensors")) # whole networks; also compressx.compile
    conv = kernels.prepare(packed, (1, 56, 56, 256))                  # one convolution
    cell = kernels.prepare_recurrent("gru_after", [uz, ur, uh])       # GRU or LSTM steps from BSPC, block-max, CSR

`grid` (the layout between layers), `schedule` (weights in the order of execution), `tuning` (tiles and loop order),
`native` and `pattern_conv.cc` (compiled code), `graph` and `network` (whole networks), `recurrent` and `recurrent.cc`,
`unified` (sign sums, counted), `pallas` (block-sparse product and convolution for GPU and TPU).
"""

from compressx.kernels.native import active_path, available
from compressx.kernels.network import Compiled, compile
from compressx.kernels.pattern_conv import Convolution, prepare, reference, supports, xla
from compressx.kernels.recurrent import Product, Recurrent, prepare_product, prepare_recurrent
from compressx.kernels.report import LayerReport
from compressx.kernels.schedule import Geometry, Plan, Sparse

__all__ = [
    "Compiled",
    "Convolution",
    "Geometry",
    "LayerReport",
    "Plan",
    "Product",
    "Recurrent",
    "Sparse",
    "active_path",
    "available",
    "compile",
    "prepare",
    "prepare_product",
    "prepare_recurrent",
    "reference",
    "supports",
    "xla",
]
