"""Distributed checkpoints (megatron-core's torch_dist), read tensor by tensor without a model."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from emu3_megatron.conversion.lazy import Placed
from emu3_megatron.conversion.maps import LAYERS, TRANSFORMER_ENGINE_NAMES
from emu3_megatron.conversion.rules import ConversionError
from emu3_megatron.training.checkpoint_files import CheckpointError, file_damage, sealed_files
from emu3_megatron.training.checkpoint_metadata import read_metadata

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a part of a stored tensor."""


class StoredTensors(Placed[tuple[str, int | None]]):
    """The weights of a committed checkpoint under our names, whatever layout wrote them.

    Files are mapped: a tensor that is stored in one part is a view and takes no memory of its own. Every file
    is compared with its checksum when its first tensor is read. To be closed.

    Args:
        folder: A committed checkpoint.
        averaged: Its averaged weights, not the plain ones.

    Raises:
        CheckpointError: its description is damaged; when a tensor is read, its file is.
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
        super().__init__(
            {
                name: place
                for key, stored in self._keys.items()
                for name, place in _names_of(key, stored, "ema." if averaged else "")
            }
        )
        self._sealed = sealed_files(folder)
        self._mapped: dict[str, mmap.mmap] = {}
        used = (str(info.relative_path) for index, info in self._storage.items() if index.fqn in self._keys)
        self._order = list(dict.fromkeys(used))
        self._checks: dict[str, Future[str | None]] = {}
        self._checker = ThreadPoolExecutor(1)

    def close(self) -> None:
        """End the thread that compares checksums, and let go of the files: nothing can be read any more.

        Tensors that were read stay valid: a file is mapped as long as one of them needs it.
        """
        self._checker.shutdown(cancel_futures=True)
        self._mapped.clear()

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor: a stored part as it is where that is all of it, else the parts put together."""
        key, layer = self._places[name]
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

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        key, layer = self._places[name]
        size = tuple(self._keys[key].size)
        return size if layer is None else size[1:]

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements."""
        return self._keys[self._places[name][0]].properties.dtype

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
        if Path(info.relative_path).name != str(info.relative_path):
            raise ConversionError(f"{where} is in {info.relative_path!r}, which is not a plain file name")
        path = self._folder / info.relative_path
        mapped = self._map(path)
        try:
            tensor = _part(path, mapped, info.offset, info.length)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConversionError(f"{path} is damaged: {where} cannot be read ({reason})") from error
        if tensor.shape != torch.Size(part.sizes):
            raise ConversionError(f"{path} is damaged: {where} has another shape than {list(part.sizes)}")
        return tensor

    def _map(self, path: Path) -> mmap.mmap:
        """A file in the address space, once its checksum has been found right."""
        if path.name not in self._mapped:
            if problem := self._check(path.name).result():
                raise CheckpointError(f"{self._folder} is damaged: {problem}; restore it from a copy")
            for following in self._order[self._order.index(path.name) + 1 :][:1]:
                self._check(following)  # meanwhile: the disk is read while tensors are written
            with open(path, "rb") as stream:
                # A private mapping, for torch takes no memory that it could not write to.
                self._mapped[path.name] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._mapped[path.name]

    def _check(self, name: str) -> Future[str | None]:
        """Compare a file with its checksum, in another thread and once."""
        if name not in self._sealed:
            raise CheckpointError(f"{self._folder / name} was not there when the checkpoint was committed")
        if name not in self._checks:
            self._checks[name] = self._checker.submit(
                file_damage, self._folder / name, self._sealed[name], checksums=True
            )
        return self._checks[name]


def _part(path: Path, mapped: mmap.mmap, offset: int, length: int) -> Tensor:
    """The tensor that torch serialised at a place of a file, as a view of the mapped file.

    torch reads what describes it and says where its elements are.
    """
    with open(path, "rb") as stream:
        view: Any = _create_file_view(stream, offset, length)
        described: Tensor = torch.load(view, map_location="meta", weights_only=True)
        storage: Any = described.untyped_storage()
        if not hasattr(storage, "_checkpoint_offset"):  # torch before 2.9 does not say
            view.seek(0)
            read: Tensor = torch.load(view, map_location="cpu", weights_only=True)
            return read
    size, begin = storage.nbytes(), storage._checkpoint_offset
    if begin + size > length:
        raise ValueError(f"its {size} bytes do not fit in {length}")
    if not described.numel():
        return torch.empty(described.shape, dtype=described.dtype)
    raw = torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=offset + begin)
    if (offset + begin) % described.element_size():
        raw = raw.clone()  # to an address that the type may stand at
    elements = raw.view(described.dtype)
    return elements.as_strided(described.shape, described.stride(), described.storage_offset())


def _names_of(
    key: str, stored: TensorStorageMetadata, prefix: str
) -> Iterator[tuple[str, tuple[str, int | None]]]:
    """Our names of a stored tensor, each with its key and layer; none where it is no weight of that kind."""
    if not key.startswith(prefix) or key.startswith("optimizer.") or (key.startswith("ema.") and not prefix):
        return
    plain = key[len(prefix) :]
    if not plain.startswith(LAYERS):
        yield plain, (key, None)
        return
    rest = plain[len(LAYERS) :]
    rest = TRANSFORMER_ENGINE_NAMES.get(rest, rest)
    for layer in range(stored.size[0]):
        yield f"{LAYERS}{layer}.{rest}", (key, layer)


def _end(part: ChunkStorageMetadata) -> int:
    return part.offsets[0] + part.sizes[0]
