"""Distributed checkpoints (megatron-core's torch_dist), written tensor by tensor without a model.

A checkpoint does not depend on a layout: any run loads it under any tensor and pipeline parallelism. It can
be cut along one all the same, so that every rank of that layout reads its own file and nothing else.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
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

from emu3_megatron.conversion.lazy import LazyTensors, ahead, blocks_of, raw_bytes
from emu3_megatron.conversion.maps import LAYERS, TRANSFORMER_ENGINE_NAMES
from emu3_megatron.conversion.processes import on_first, rank, share, together
from emu3_megatron.conversion.rules import ConversionError
from emu3_megatron.parallel.config import ParallelConfig
from emu3_megatron.training.checkpoint import CONTENT_METADATA
from emu3_megatron.training.checkpoint_metadata import METADATA, write_format

FILE_BYTES = 4 << 30
"""A file that has grown so large is followed by another."""

ALIGNMENT = 64
"""Parts start at multiples of it, so that their elements can be mapped."""

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
        write_format(folder, CONTENT_METADATA)

    on_first(describe)
    return sealed


def _in_stages(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names in the order of a pipeline: embedding, layers, what stands after them."""

    def position(name: str) -> int:
        if name.startswith(LAYERS):
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
    if name.startswith(LAYERS):
        number, rest = name[len(LAYERS) :].split(".", 1)
        layer = int(number)
        key = LAYERS + _STORED_NAMES.get(rest, rest)
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
            name = pieces[0].name
            cut = tensors[name] if len(pieces) > 1 else None
            for piece in pieces:
                stream = streams.get(piece.file)
                if stream is None or stream.written >= FILE_BYTES:
                    path = folder / f"__{rank()}_{len(sealed)}.distcp"
                    stream = stack.enter_context(_Stream(path))
                    streams[piece.file] = stream
                    sealed[path.name] = stream.seal
                blocks = tensors.blocks(name) if cut is None else blocks_of(cut[piece.slices])
                index = MetadataIndex(piece.key, piece.offsets)
                places[index] = stream.save_tensor(piece.shape, tensors.dtype(name), blocks)
            del cut  # room for the next
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
            yield f"{LAYERS}{state}/shard_{layer}_{num_layers}"


class _Stream(io.RawIOBase):
    """A file that is written front to back, its checksum taken on the way, durable once closed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] = open(path, "wb", buffering=0)  # noqa: SIM115  (closed by `close`)
        self._checksum = 0
        self._elements: tuple[int, Iterator[Tensor]] | None = None
        self.written = 0
        """Bytes so far."""
        self.seal: dict[str, int | str] = {}
        """Size and checksum, filled when the file is closed."""

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: Any) -> int:
        """Append bytes; those of the memory that stands for a tensor's elements are taken from its blocks."""
        view = np.frombuffer(data, np.uint8)
        if self._elements is None or view.ctypes.data != self._elements[0] or not len(view):
            self._append(view)
            return len(view)
        begin, blocks = self.written, self._elements[1]
        self._elements = None
        for block in ahead(blocks):
            self._append(raw_bytes(block))
        if self.written - begin != len(view):
            raise RuntimeError(f"blocks of {self.written - begin} bytes for a tensor of {len(view)}")
        return len(view)

    def save(self, value: Tensor | list[None]) -> _StorageInfo:
        """Append what torch makes of a tensor or an empty state; where it stands."""
        self._append(np.zeros(-self.written % ALIGNMENT, np.uint8))
        begin = self.written
        stream: Any = self  # write is all that torch calls
        torch.save(value, stream)
        return _StorageInfo(self._path.name, begin, self.written - begin)

    def save_tensor(
        self, shape: tuple[int, ...], dtype: torch.dtype, blocks: Iterator[Tensor]
    ) -> _StorageInfo:
        """Append a tensor as torch serialises it, its elements from blocks of rows; where it stands.

        torch is given memory that nobody touches, which therefore is none.
        """
        untouched = torch.empty(shape, dtype=dtype)
        self._elements = (untouched.data_ptr(), blocks)
        with _without_zip_checksums():
            place = self.save(untouched)
        if self._elements is not None and untouched.numel():
            raise RuntimeError("torch did not write the elements in one piece")
        self._elements = None
        return place

    def _append(self, data: NDArray[np.uint8]) -> None:
        self._checksum = google_crc32c.extend(self._checksum, data)
        left = data.data
        while left:
            left = left[self._file.write(left) :]
        self.written += len(data)

    def close(self) -> None:
        """Write everything to the disk and take the seal."""
        if not self.closed:
            os.fsync(self._file.fileno())
            self._file.close()
            self.seal.update(bytes=self.written, crc32c=f"{self._checksum:08x}")
        super().close()


@contextmanager
def _without_zip_checksums() -> Iterator[None]:
    """torch reads no elements for a checksum that its loader never looks at; the file has its own."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


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
