"""Indexed multimodal datasets, mixtures, packing plans, windows and their loader.

The loader needs torch and is imported from `emu3_megatron.data.loader`; everything here needs numpy alone.
"""

from emu3_megatron.data.manifest import Manifest, read_shard_record, write_manifest
from emu3_megatron.data.mixture import Mixture, Source
from emu3_megatron.data.packing import PackedWindows, pack
from emu3_megatron.data.plan import Plan
from emu3_megatron.data.reader import MultimodalDataset
from emu3_megatron.data.statistics import PlanStatistics
from emu3_megatron.data.template import Template
from emu3_megatron.data.window import Window
from emu3_megatron.data.writer import DatasetWriter, ShardWriter

__all__ = [
    "DatasetWriter",
    "Manifest",
    "Mixture",
    "MultimodalDataset",
    "PackedWindows",
    "Plan",
    "PlanStatistics",
    "ShardWriter",
    "Source",
    "Template",
    "Window",
    "pack",
    "read_shard_record",
    "write_manifest",
]
