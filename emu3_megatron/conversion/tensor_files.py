"""Safetensors folders: read tensor by tensor, written in shards with an index.

The layout is that of the Hugging Face hub: ``model.safetensors``, or ``model-00001-of-00003.safetensors``
with ``model.safetensors.index.json``. Pickled ``.bin`` files are refused: reading one runs code from the
file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from emu3_megatron.conversion.rules import ConversionError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000
"""Largest shard, as the hub's tools write."""


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of a folder of safetensors, read when asked for.

    Raises `ConversionError` when the folder holds no safetensors, when its index names a file that is missing
    or outside the folder, or when a file is damaged (the file is named).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for path in self._paths():
            self._scan(path)
        self._check_index()

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor into memory."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        """Names, in the order of the files."""
        return iter(self._files)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return self._shapes[name]

    def with_prefix(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose name starts with `prefix`, read, under the rest of their name."""
        return {name[len(prefix) :]: self[name] for name in self if name.startswith(prefix)}

    def without_prefix(self, prefix: str | None) -> TensorView:
        """A lazy view of the tensors whose name does not start with `prefix` (None: of all)."""
        return TensorView(self, [name for name in self if prefix is None or not name.startswith(prefix)])

    def _paths(self) -> list[Path]:
        """The files to read: those of the index, or the single file."""
        index = self.folder / INDEX
        if index.is_file():
            return [self.folder / name for name in sorted(set(self._weight_map(index).values()))]
        if (self.folder / SINGLE).is_file():
            return [self.folder / SINGLE]
        if any(self.folder.glob("*.bin")):
            raise ConversionError(
                f"{self.folder} holds pickled .bin weights only; reading them runs code from the file. "
                "Convert them to safetensors first"
            )
        raise ConversionError(f"{self.folder} holds neither {SINGLE} nor {INDEX}")

    def _weight_map(self, index: Path) -> dict[str, str]:
        """Tensor name to file name, checked."""
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            entries = {str(name): str(file) for name, file in weight_map.items()}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ConversionError(f"{index} is not a safetensors index: {error}") from error
        for file in set(entries.values()):
            if Path(file).name != file:
                raise ConversionError(f"{index} names {file!r}, which is not a plain file name in its folder")
            if not (self.folder / file).is_file():
                raise ConversionError(f"{index} names {file!r}, which is missing")
        return entries

    def _scan(self, path: Path) -> None:
        """Read a file's header."""
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (a safetensors file is not a mapping)
                    if name in self._files:
                        raise ConversionError(
                            f"tensor {name} stands in both {self._files[name].name} and {path.name}"
                        )
                    self._files[name] = path
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{path} is damaged or no safetensors file: {error}") from error

    def _check_index(self) -> None:
        """The index and the files' headers must tell the same story."""
        index = self.folder / INDEX
        if not index.is_file():
            return
        stated = self._weight_map(index)
        problems = [
            f"{name} should be in {file}"
            for name, file in stated.items()
            if name not in self._files or self._files[name].name != file
        ]
        problems += [f"{name} is not in the index" for name in self._files if name not in stated]
        if problems:
            raise ConversionError(f"{index} does not match its files: " + "; ".join(problems))


class TensorView(Mapping[str, Tensor]):
    """Some tensors of a `TensorFiles`, still read when asked for."""

    def __init__(self, files: TensorFiles, names: Iterable[str]) -> None:
        self._files = files
        self._names = dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor into memory."""
        if name not in self._names:
            raise KeyError(name)
        return self._files[name]

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return self._files.shape(name)


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write tensors as safetensors shards of at most `shard_bytes` (a larger tensor has its own); return
    bytes.

    At most one shard is held in memory. `folder` must exist and is not published: see `publish_folder`.
    """
    shards: list[tuple[Path, list[str]]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total = 0

    def flush() -> None:
        nonlocal pending_bytes
        path = folder / f"shard-{len(shards):05d}.part"
        save_file(pending, path, metadata={"format": "pt"})
        shards.append((path, list(pending)))
        pending.clear()
        pending_bytes = 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > shard_bytes:
            flush()
        # clone: a view would drag its whole storage along, and two views may share one
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        pending_bytes += size
        total += size
    if pending:
        flush()
    _name_shards(folder, shards, total)
    return total


def _name_shards(folder: Path, shards: list[tuple[Path, list[str]]], total: int) -> None:
    """Give the shards their final names, now that their number is known, and write the index."""
    if len(shards) == 1:
        shards[0][0].rename(folder / SINGLE)
        return
    weight_map = {}
    for number, (path, names) in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def cast(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """The same tensors in `dtype` (None: as they are)."""
    for name, tensor in tensors:
        yield name, tensor if dtype is None else tensor.to(dtype)
