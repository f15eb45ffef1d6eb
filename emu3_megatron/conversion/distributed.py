"""Distributed checkpoints (megatron-core's torch_dist), read and written tensor by tensor without a model.

A checkpoint does not depend on a layout: any run loads it under any tensor and pipeline parallelism. It can
be cut along one all the same, so that every rank of that layout reads its own file and nothing else.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import google_crc32c
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from emu3_megatron.conversion.lazy import LazyTensors
from emu3_megatron.conversion.maps import TRANSFORMER_ENGINE_NAMES
from emu3_megatron.conversion.processes import on_first, rank, share, together
from emu3_megatron.conversion.rules import ConversionError
from emu3_megatron.parallel.config import ParallelConfig
from emu3_megatron.training.checkpoint import CONTENT_METADATA
from emu3_megatron.training.checkpoint_metadata import METADATA, read_metadata

FILE_BYTES = 4 << 30
"""A file that has grown so large is followed by another."""

PIECE = 1 << 22
"""Bytes that are written and checksummed at a time."""

_LAYERS = "decoder.layers."
_STATES = (
    "self_attention.linear_proj._extra_state",
    "self_attention.linear_qkv._extra_state",
    "mlp.linear_fc1._extra_state",
    "mlp.linear_fc2._extra_state",
)
"""megatron-core asks a checkpoint for these of every layer; ours are empty."""

EMPTY: list[None] = [None]
"""An empty state, as megatron-core stores it."""

_STORED_NAMES = {plain: fused for fused, plain in TRANSFORMER_ENGINE_NAMES.items()}
"""Norms are stored under Transformer Engine's names, whatever the platform."""

SplitAxis = Callable[[str], tuple[int | None, int]]
"""See `Converted.split_axis`."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a part of a stored tensor."""


class StoredTensors(LazyTensors):
    """The weights of a checkpoint folder under our names, whatever layout wrote them.

    Args:
        folder: A committed checkpoint.
        averaged: Its averaged weights, not the plain ones.

    Raises:
        CheckpointError: its description is damaged.
    """

    def __init__(self, folder: Path, *, averaged: bool = False) -> None:
        self._folder = folder
        metadata = read_metadata(folder)
        self._storage = metadata.storage_data
        self._keys = {
            key: stored
            for key, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        self._names = {
            name: place
            for key, stored in self._keys.items()
            for name, place in _names_of(key, stored, "ema." if averaged else "")
        }

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor: a stored part as it is where that is all of it, else the parts put together."""
        key, layer = self._names[name]
        stored = self._keys[key]
        parts = [part for part in stored.chunks if layer is None or part.offsets[0] <= layer < _end(part)]
        if len(parts) == 1 and parts[0].sizes == self._box(key, layer)[1]:
            return self._read(key, parts[0]).reshape(self.shape(name))
        whole = torch.empty(self.shape(name), dtype=self.dtype(name))
        filled = 0
        for part in parts:
            values = self._read(key, part)
            offsets, sizes = tuple(part.offsets), tuple(part.sizes)
            if layer is not None:
                values, offsets, sizes = values[layer - offsets[0]], offsets[1:], sizes[1:]
            region = whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]
            region.copy_(values)
            filled += region.numel()
        if filled != whole.numel():
            raise ConversionError(f"{self._folder}: the parts of {name} leave holes or overlap")
        return whole

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name."""
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        key, layer = self._names[name]
        size = tuple(self._keys[key].size)
        return size if layer is None else size[1:]

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements."""
        return self._keys[self._names[name][0]].properties.dtype

    def _box(self, key: str, layer: int | None) -> Box:
        size = tuple(self._keys[key].size)
        if layer is None:
            return (0,) * len(size), size
        return (layer, *(0,) * (len(size) - 1)), (1, *size[1:])

    def _read(self, key: str, part: ChunkStorageMetadata) -> Tensor:
        """One stored part."""
        where = f"{self._folder}: the part of {key} at {list(part.offsets)}"
        try:
            info = self._storage[MetadataIndex(key, part.offsets)]
        except KeyError as error:
            raise ConversionError(f"{where} is in no file") from error
        path = self._folder / info.relative_path
        if Path(info.relative_path).name != str(info.relative_path):
            raise ConversionError(f"{where} is in {info.relative_path!r}, which is not a plain file name")
        try:
            with open(path, "rb") as stream:
                view: Any = _create_file_view(stream, info.offset, info.length)
                tensor = torch.load(view, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConversionError(f"{path} is damaged: {where} cannot be read ({reason})") from error
        if not isinstance(tensor, Tensor) or tensor.shape != torch.Size(part.sizes):
            raise ConversionError(f"{path} is damaged: {where} has another shape than {list(part.sizes)}")
        return tensor


def _names_of(
    key: str, stored: TensorStorageMetadata, prefix: str
) -> Iterator[tuple[str, tuple[str, int | None]]]:
    """Our names of a stored tensor, each with its key and layer; none where it is no weight of that kind."""
    if not key.startswith(prefix) or key.startswith("optimizer.") or (key.startswith("ema.") and not prefix):
        return
    plain = key[len(prefix) :]
    if not plain.startswith(_LAYERS):
        yield plain, (key, None)
        return
    rest = plain[len(_LAYERS) :]
    rest = TRANSFORMER_ENGINE_NAMES.get(rest, rest)
    for layer in range(stored.size[0]):
        yield f"{_LAYERS}{layer}.{rest}", (key, layer)


def _end(part: ChunkStorageMetadata) -> int:
    return part.offsets[0] + part.sizes[0]


@dataclass(frozen=True)
class _Piece:
    """One part of one tensor, to be written to one file."""

    name: str
    key: str
    offsets: tuple[int, ...]
    """In the stored tensor."""
    shape: tuple[int, ...]
    slices: tuple[slice, ...]
    """Of our tensor."""
    layer: int | None
    file: tuple[int, int]
    """Pipeline stage and tensor rank that read it."""
    size: torch.Size
    """Of the whole stored tensor."""


@dataclass(frozen=True)
class _Written:
    """What one process wrote."""

    places: dict[MetadataIndex, Any]
    sealed: dict[str, dict[str, int | str]]


def write_checkpoint_tensors(
    folder: Path,
    tensors: LazyTensors,
    split_axis: SplitAxis,
    *,
    num_layers: int,
    parallel: ParallelConfig,
) -> dict[str, dict[str, int | str]]:
    """Write our tensors as the torch_dist files of a checkpoint that is not committed yet.

    One tensor is in memory at a time; all processes call it together and divide the tensors.

    Args:
        folder: Exists and is empty.
        tensors: Under our names (tensor parallelism 1).
        split_axis: See `Converted.split_axis`.
        num_layers: Of the model.
        parallel: Layout whose ranks read whole files; every other one can load the checkpoint too.

    Returns:
        Size and checksum of the tensor files by name, as `checkpoint_files.commit` takes them.
    """
    by_name = {
        name: _pieces(name, tensors.shape(name), split_axis(name), num_layers, parallel)
        for name in _in_stages(tensors)
    }
    names = list(by_name)
    mine = [names[index] for index in share([tensors.nbytes(name) for name in names])]
    written = together(lambda: _write_share(folder, tensors, [by_name[name] for name in mine], num_layers))
    sealed = {name: entry for part in written for name, entry in part.sealed.items()}

    def describe() -> None:
        pieces = [piece for parts in by_name.values() for piece in parts]
        places = {index: place for part in written for index, place in part.places.items()}
        with open(folder / METADATA, "wb") as stream:
            pickle.dump(_metadata(pieces, tensors, places), stream)
        torch.save({"content_metadata": CONTENT_METADATA}, folder / "common.pt")
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        backend |= {"common_backend": "torch", "common_backend_version": 1}
        (folder / "metadata.json").write_text(json.dumps(backend))

    on_first(describe)
    return sealed


def _in_stages(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names in the order of a pipeline: embedding, layers, what stands after them."""

    def position(name: str) -> int:
        if name.startswith(_LAYERS):
            return int(name.split(".")[2])
        return -1 if name.startswith("embedding.") else 1 << 30

    return sorted(tensors, key=position)


def _pieces(
    name: str,
    shape: tuple[int, ...],
    split: tuple[int | None, int],
    num_layers: int,
    parallel: ParallelConfig,
) -> list[_Piece]:
    """How one tensor is cut for the ranks of a layout."""
    stages, ranks = parallel.pipeline_model_parallel_size, parallel.tensor_model_parallel_size
    key, layer = name, None
    stage = 0 if name.startswith("embedding.") else stages - 1
    if name.startswith(_LAYERS):
        number, rest = name[len(_LAYERS) :].split(".", 1)
        layer = int(number)
        key = _LAYERS + _STORED_NAMES.get(rest, rest)
        stage = layer * stages // num_layers
    axis, blocks = split
    parts = [(0, ranks - 1)] if axis is None else [(part, part % ranks) for part in range(ranks * blocks)]
    axis = axis or 0
    length = shape[axis] // len(parts)
    if length * len(parts) != shape[axis]:
        raise ConversionError(
            f"{name} {list(shape)} does not divide into {len(parts)} parts along axis {axis}; "
            "choose another --tensor-parallel"
        )
    pieces = []
    for part, owner in parts:
        slices = [slice(0, size) for size in shape]
        slices[axis] = slice(part * length, (part + 1) * length)
        offsets = [cut.start for cut in slices]
        own = [cut.stop - cut.start for cut in slices]
        stacked: tuple[list[int], list[int], list[int]] = ([], [], [])
        if layer is not None:
            stacked = ([layer], [1], [num_layers])
        pieces.append(
            _Piece(
                name=name,
                key=key,
                offsets=tuple(stacked[0] + offsets),
                shape=tuple(stacked[1] + own),
                slices=tuple(slices),
                layer=layer,
                file=(stage, owner if len(parts) > 1 else 0),
                size=torch.Size(stacked[2] + list(shape)),
            )
        )
    return pieces


def _write_share(
    folder: Path, tensors: LazyTensors, share_of_pieces: Sequence[Sequence[_Piece]], num_layers: int
) -> _Written:
    """Write this process's tensors, each part to the file of the rank that reads it."""
    places: dict[MetadataIndex, Any] = {}
    sealed: dict[str, dict[str, int | str]] = {}
    with ExitStack() as stack:
        streams: dict[tuple[int, int], _Stream] = {}
        for pieces in share_of_pieces:
            tensor = tensors[pieces[0].name]
            for piece in pieces:
                stream = streams.get(piece.file)
                if stream is None or stream.written >= FILE_BYTES:
                    path = folder / f"__{rank()}_{len(sealed)}.distcp"
                    stream = stack.enter_context(_Stream(path))
                    streams[piece.file] = stream
                    sealed[path.name] = stream.seal
                values = tensor[piece.slices].contiguous().reshape(piece.shape)
                if values.untyped_storage().nbytes() != values.nbytes:
                    values = values.clone()  # torch would write the whole storage
                places[MetadataIndex(piece.key, piece.offsets)] = stream.save(values)
                del values
            del tensor  # room for the next
        if rank() == 0:
            path = folder / f"__0_{len(sealed)}.distcp"
            stream = stack.enter_context(_Stream(path))
            sealed[path.name] = stream.seal
            for state in _states(num_layers):
                places[MetadataIndex(state)] = stream.save(EMPTY)
    return _Written(places, sealed)


def _states(num_layers: int) -> Iterator[str]:
    """Keys of the empty states of all layers."""
    for layer in range(num_layers):
        for state in _STATES:
            yield f"{_LAYERS}{state}/shard_{layer}_{num_layers}"


class _Stream(io.RawIOBase):
    """A file that is written front to back, its checksum taken on the way, durable once closed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] = open(path, "wb", buffering=0)  # noqa: SIM115  (closed by `close`)
        self._checksum = 0
        self.written = 0
        """Bytes so far."""
        self.seal: dict[str, int | str] = {}
        """Size and checksum, filled when the file is closed."""

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: Any) -> int:
        """Append bytes."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PIECE):
            piece = bytes(view[start : start + PIECE])
            self._checksum = google_crc32c.extend(self._checksum, piece)
            left = memoryview(piece)
            while left:
                left = left[self._file.write(left) :]
        self.written += len(view)
        return len(view)

    def save(self, value: Tensor | list[None]) -> _StorageInfo:
        """Append a tensor or an empty state as torch serialises it; where it stands."""
        begin = self.written
        stream: Any = self  # write is all that torch calls
        torch.save(value, stream)
        return _StorageInfo(self._path.name, begin, self.written - begin)

    def close(self) -> None:
        """Write everything to the disk and take the seal."""
        if not self.closed:
            os.fsync(self._file.fileno())
            self._file.close()
            self.seal.update(bytes=self.written, crc32c=f"{self._checksum:08x}")
        super().close()


def _metadata(
    pieces: Sequence[_Piece], tensors: LazyTensors, places: Mapping[MetadataIndex, Any]
) -> Metadata:
    """The description of all tensors and of the empty states."""
    described: dict[str, Any] = {}
    for piece in pieces:
        stored = described.setdefault(
            piece.key,
            TensorStorageMetadata(
                properties=TensorProperties(dtype=tensors.dtype(piece.name)), size=piece.size, chunks=[]
            ),
        )
        stored.chunks.append(
            ChunkStorageMetadata(offsets=torch.Size(piece.offsets), sizes=torch.Size(piece.shape))
        )
    for index in places:
        described.setdefault(index.fqn, BytesStorageMetadata())
    return Metadata(
        described, storage_data=dict(places), storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION
    )
