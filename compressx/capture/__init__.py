"""What a layer really multiplies: the matrix of a leaf, and statistics of the inputs it is multiplied with."""

from compressx.capture.capture import CaptureError, capture
from compressx.capture.matrix import Gram, MatrixView, matrix_view
from compressx.capture.observers import GRAM, RANGES, Observer, Ranges
from compressx.capture.saved import StateError

__all__ = [
    "GRAM",
    "RANGES",
    "CaptureError",
    "Gram",
    "MatrixView",
    "Observer",
    "Ranges",
    "StateError",
    "capture",
    "matrix_view",
]
