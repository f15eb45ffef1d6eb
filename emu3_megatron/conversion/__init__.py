"""Weight maps and converters to and from Hugging Face."""

from emu3_megatron.conversion.hugging_face import (
    ExportedModel,
    ImportedModel,
    export_hugging_face,
    open_hugging_face,
)
from emu3_megatron.conversion.maps import LAYOUTS, WeightMap
from emu3_megatron.conversion.rules import Architecture, ConversionError

__all__ = [
    "LAYOUTS",
    "Architecture",
    "ConversionError",
    "ExportedModel",
    "ImportedModel",
    "WeightMap",
    "export_hugging_face",
    "open_hugging_face",
]
