"""The description of a distributed checkpoint's tensors, read without running what a pickle may ask for.

torch writes it as a pickle (``.metadata``), and megatron-core reads that as it is. A checkpoint may come from
elsewhere: `read_metadata` makes nothing but the few types that such a description consists of.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from emu3_megatron.training.checkpoint_files import CheckpointError

METADATA = ".metadata"

_TYPES: dict[str, frozenset[str]] = {
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        }
    ),
    "torch.distributed.checkpoint.planner": frozenset(
        {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"}
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo", "_StoragePrefix"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch": frozenset({"Size"}),
    "megatron.core.dist_checkpointing.strategies.torch": frozenset({"MCoreMetadata", "MCoreSavePlan"}),
    "collections": frozenset({"OrderedDict"}),
    "pathlib": frozenset({"Path", "PosixPath", "PurePosixPath"}),
}
"""Module to the names in it that a description is made of."""


class _Unpickler(pickle.Unpickler):
    """Finds the types of `_TYPES` and torch's element types, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The type of that name.

        Raises `pickle.UnpicklingError` for every other one.
        """
        if name in _TYPES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


def read_metadata(folder: Path) -> Metadata:
    """The names, shapes and places of a distributed checkpoint's tensors.

    Raises:
        CheckpointError: the file is missing, damaged, or asks for anything but data.
    """
    path = folder / METADATA
    try:
        with open(path, "rb") as stream:
            metadata = _Unpickler(stream).load()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; is {folder} a distributed checkpoint?") from error
    except Exception as error:  # a damaged pickle may fail in any way
        raise CheckpointError(f"{path} is damaged or not to be trusted: {error}") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path} holds a {type(metadata).__name__}, not a checkpoint's description")
    return metadata
