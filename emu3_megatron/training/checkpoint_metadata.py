"""What a distributed checkpoint holds as pickles, read without running what a pickle may ask for.

torch writes the description of the tensors as a pickle (``.metadata``), and objects that are no tensors as
pickles among them; megatron-core reads both as they are. A checkpoint may come from elsewhere:
`read_metadata` makes nothing but the few types that such a description consists of, and `refuse_code` looks
at both before megatron-core does.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.utils._pytree import tree_leaves

from emu3_megatron.training.checkpoint_files import CheckpointError

METADATA = ".metadata"
SHARDED_BACKEND = ("torch_dist", 1)
"""megatron-core's name and version of the way in which tensors are stored."""

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


def write_format(folder: Path, content: dict[str, Any]) -> None:
    """Write megatron-core's two files beside the tensors: their format, and what it keeps of the content.

    Up to 0.18 it demands both of them, and from 0.19 on it still reads them; what it stores in their place
    from then on is a pickle among the tensors, which older versions do not find.

    Args:
        folder: Of a checkpoint that is not committed yet.
        content: Plain values.

    Raises:
        OSError: a file cannot be written.
    """
    name, version = SHARDED_BACKEND
    backend = {"sharded_backend": name, "sharded_backend_version": version}
    backend |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backend))
    plain = io.BytesIO()  # torch itself turns a full disk into a RuntimeError
    torch.save({"content_metadata": content}, plain)
    (folder / "common.pt").write_bytes(plain.getvalue())


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


def refuse_code(folder: Path) -> None:
    """Look at everything that megatron-core would unpickle from a checkpoint, before it does.

    Its modules keep states (``_extra_state``) that hold nothing in the precisions that we train in. Those of
    Transformer Engine's FP8 are tensors that it unpickles in turn: only empty ones pass.

    Raises:
        CheckpointError: the description or an object is damaged, or asks for anything but data.
    """
    metadata = read_metadata(folder)
    for key, stored in metadata.state_dict_metadata.items():
        if not isinstance(stored, BytesStorageMetadata):
            continue
        try:
            value = _read_object(folder, metadata.storage_data[MetadataIndex(key)])
        except Exception as error:  # a damaged pickle may fail in any way
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{folder}: object {key} is damaged or not to be trusted: {reason}"
            ) from error
        if any(isinstance(leaf, torch.Tensor) and leaf.numel() for leaf in tree_leaves(value)):
            raise CheckpointError(
                f"{folder}: object {key} holds a state that Transformer Engine would unpickle, which could "
                "run code; our checkpoints never do: save this one without such states"
            )


def _read_object(folder: Path, place: Any) -> Any:
    """An object that stands among the tensors of a file, made of plain data alone."""
    if Path(place.relative_path).name != str(place.relative_path):
        raise ValueError(f"it is in {place.relative_path!r}, which is not a plain file name")
    with open(folder / place.relative_path, "rb") as stream:
        stream.seek(place.offset)
        return torch.load(io.BytesIO(stream.read(place.length)), map_location="cpu", weights_only=True)


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
