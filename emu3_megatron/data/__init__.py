"""Indexed multimodal datasets, mixtures, packing plans, windows and their loader."""

from emu3_megatron.data.manifest import Manifest, read_shard_record, write_manifest
from emu3_megatron.data.writer import DatasetWriter, ShardWriter

__all__ = ["DatasetWriter", "Manifest", "ShardWriter", "read_shard_record", "write_manifest"]
