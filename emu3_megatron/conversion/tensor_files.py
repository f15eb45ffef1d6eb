"""Tensor folders of the Hugging Face hub: read tensor by tensor, written in shards with an index.

Safetensors: ``model.safetensors``, or ``model-00001-of-00003.safetensors`` with
``model.safetensors.index.json``. Pickled ``.bin`` files are read only where the caller says so, and then by
torch's loader that makes nothing but tensors.
"""

from __future__ import annotations

import json
import pickle
import struct
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emu3_megatron.conversion.lazy import LazyTensors, Placed, ahead, raw_bytes
from emu3_megatron.conversion.processes import on_first, share, together
from emu3_megatron.conversion.rules import ConversionError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED_INDEX = "pytorch_model.bin.index.json"
PICKLED_SINGLE = "pytorch_model.bin"
SHARD_BYTES = 5_000_000_000
"""Largest shard, as the hub's tools write."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of types in the header of a safetensors file."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFolder(Placed[Path]):
    """The tensors of a folder of weight files: one file, or several with an index.

    Raises `ConversionError` when there are none, when the index names a file that is missing or outside the
    folder or does not match the files, or when a file is damaged (the file is named).
    """

    index: str
    single: str

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, Path] = {}
        super().__init__(self._files)
        for path in self._paths():
            for name in self._scan(path):
                if name in self._files:
                    raise ConversionError(
                        f"tensor {name} stands in both {self._files[name].name} and {path.name}"
                    )
                self._files[name] = path
        self._check_index()

    @abstractmethod
    def _scan(self, path: Path) -> list[str]:
        """Names of a file's tensors; keeps what `shape`, `dtype` and reading need."""

    def _paths(self) -> list[Path]:
        """The files to read: those of the index, or the single file."""
        if (self.folder / self.index).is_file():
            return [self.folder / name for name in sorted(set(self._weight_map().values()))]
        if (self.folder / self.single).is_file():
            return [self.folder / self.single]
        raise ConversionError(f"{self.folder} holds neither {self.single} nor {self.index}")

    def _weight_map(self) -> dict[str, str]:
        """Tensor name to file name, checked."""
        index = self.folder / self.index
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            entries = {str(name): str(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConversionError(f"{index} is not an index of weight files: {error}") from error
        if not entries:
            raise ConversionError(f"{index} names no tensor")
        for file in sorted(set(entries.values())):
            if Path(file).name != file:
                raise ConversionError(f"{index} names {file!r}, which is not a plain file name in its folder")
            if not (self.folder / file).is_file():
                raise ConversionError(f"{index} names {file!r}, which is missing")
        return entries

    def _check_index(self) -> None:
        """The index and the files' headers must tell the same story."""
        index = self.folder / self.index
        if not index.is_file():
            return
        stated = self._weight_map()
        problems = [
            f"{name} should be in {file}"
            for name, file in stated.items()
            if name not in self._files or self._files[name].name != file
        ]
        problems += [f"{name} is not in the index" for name in self._files if name not in stated]
        if problems:
            raise ConversionError(f"{index} does not match its files: " + "; ".join(problems))


class TensorFiles(TensorFolder):
    """A folder of safetensors. Tensors are views of mapped files: reading one takes no memory of its own."""

    index, single = INDEX, SINGLE

    def __init__(self, folder: str | Path) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._open: tuple[Path | None, Any] = (None, None)
        super().__init__(folder)

    def __getitem__(self, name: str) -> Tensor:
        """One tensor."""
        path = self._files[name]
        if self._open[0] != path:
            self._open = (path, safe_open(path, framework="pt"))
        tensor: Tensor = self._open[1].get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements, from the file's header."""
        return self._dtypes[name]

    def _scan(self, path: Path) -> list[str]:
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                for name in names:
                    part = file.get_slice(name)
                    if part.get_dtype() not in DTYPES:
                        raise ConversionError(
                            f"{path}: tensor {name} is {part.get_dtype()}, expected one of "
                            f"{', '.join(DTYPES)}"
                        )
                    self._shapes[name] = tuple(part.get_shape())
                    self._dtypes[name] = DTYPES[part.get_dtype()]
                return names
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{path} is damaged or no safetensors file: {error}") from error


class PickledFiles(TensorFolder):
    """A folder of pickled ``.bin`` files, read by torch's loader that makes nothing but tensors."""

    index, single = PICKLED_INDEX, PICKLED_SINGLE

    def __init__(self, folder: str | Path) -> None:
        self._tensors: dict[str, Tensor] = {}
        super().__init__(folder)

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, a view of the mapped file."""
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements."""
        return self._tensors[name].dtype

    def _scan(self, path: Path) -> list[str]:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError, OSError, EOFError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConversionError(f"{path} is damaged, or holds more than tensors: {reason}") from error
        if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
            raise ConversionError(f"{path} holds no plain state dict of tensors")
        self._tensors.update({name: tensor.detach().contiguous() for name, tensor in state.items()})
        return list(state)


def open_tensors(folder: str | Path, *, allow_pickle: bool = False) -> TensorFolder:
    """The tensors of a folder.

    Raises `ConversionError` as `TensorFolder` does, and when the only weights are pickled and `allow_pickle`
    is not set.
    """
    path = Path(folder)
    if (path / INDEX).is_file() or (path / SINGLE).is_file():
        return TensorFiles(path)
    if any(path.glob("*.bin")):
        if allow_pickle:
            return PickledFiles(path)
        raise ConversionError(
            f"{path} holds pickled .bin weights only, a format that can carry code. Convert them to "
            "safetensors, or allow them with --allow-pickle: then torch's weights-only loader reads them"
        )
    return TensorFiles(path)


def write_tensors(folder: Path, tensors: LazyTensors, *, shard_bytes: int = SHARD_BYTES) -> int:
    """Write tensors as safetensors shards of at most `shard_bytes` (a larger tensor has its own); return
    bytes.

    One tensor is in memory at a time; all processes call it together and divide the shards. `folder` must
    exist and is not published: see `publish_folder`.
    """
    shards = _plan_shards(tensors, shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
    )
    sizes = [sum(tensors.nbytes(name) for name in shard) for shard in shards]

    def write_share() -> None:
        for number in share(sizes):
            _write_shard(folder / names[number], tensors, shards[number])

    together(write_share)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        on_first(lambda: (folder / INDEX).write_text(text, encoding="utf-8"))
    return sum(sizes)


def _plan_shards(tensors: LazyTensors, shard_bytes: int) -> list[list[str]]:
    """Names of every shard; each starts with the widest types, so that all elements are aligned."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in tensors:
        size = tensors.nbytes(name)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return [sorted(shard, key=lambda name: -tensors.dtype(name).itemsize) for shard in shards]


def _write_shard(path: Path, tensors: LazyTensors, names: list[str]) -> None:
    """One safetensors file: length of the header, header, elements."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + tensors.nbytes(name)
        header[name] = {
            "dtype": _NAMES[tensors.dtype(name)],
            "shape": list(tensors.shape(name)),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            for block in ahead(tensors.blocks(name)):
                stream.write(raw_bytes(block).data)
