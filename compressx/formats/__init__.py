"""Storage formats: weights with no redundancy left, in exact bytes. A new one is a file and its line in `FORMATS`."""

from compressx.formats.base import MAX_BYTES, CompressedFileError, Format, Packed, nbytes
from compressx.formats.file import SavedModel, Sizes, save_model
from compressx.formats.loading import OpenModel, load_model, open_model
from compressx.formats.on_levels import in_floats
from compressx.formats.packing import FORMATS, pack, unpack
from compressx.formats.portable import RulesFile, read_rules, write_rules

__all__ = [
    "FORMATS",
    "MAX_BYTES",
    "CompressedFileError",
    "Format",
    "OpenModel",
    "Packed",
    "RulesFile",
    "SavedModel",
    "Sizes",
    "in_floats",
    "load_model",
    "nbytes",
    "open_model",
    "pack",
    "read_rules",
    "save_model",
    "unpack",
    "write_rules",
]
