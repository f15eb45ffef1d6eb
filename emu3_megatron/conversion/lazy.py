"""Tensors that are read when asked for; their names, shapes and types are known without reading."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emu3_megatron.conversion.rules import ConversionError

BLOCK_BYTES = 1 << 20
"""Size of the blocks that tensors are read and written in: one stays in a core's cache meanwhile."""

BLOCKS_AHEAD = 4
"""Blocks that are made before they are asked for."""

Place = TypeVar("Place")


class LazyTensors(Mapping[str, Tensor]):
    """A state dict of which one tensor at a time is in memory."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements, without reading it."""

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor's elements, without reading it."""
        return torch.Size(self.shape(name)).numel() * self.dtype(name).itemsize

    def blocks(self, name: str) -> Iterator[Tensor]:
        """A tensor as blocks of its rows: contiguous, in order, of about `BLOCK_BYTES`.

        A number alone comes as a row of one.
        """
        yield from blocks_of(self[name])

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name; does not read it."""
        return any(name == own for own in self)


class Placed(LazyTensors, Generic[Place]):
    """Tensors whose places are known by name."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self._places = places

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._places)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name."""
        return name in self._places


class InMemory(Placed[Tensor]):
    """A plain state dict."""

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, detached."""
        return self._places[name].detach()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._places[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements."""
        return self._places[name].dtype


class Renamed(Placed[str]):
    """Some tensors of another, under other names.

    Args:
        source: Where they are read.
        names: New name to the name in `source`, in order.
    """

    def __init__(self, source: LazyTensors, names: Mapping[str, str]) -> None:
        super().__init__(dict(names))
        self._source = source

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        return self._source[self._places[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._source.shape(self._places[name])

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements."""
        return self._source.dtype(self._places[name])


def select(source: LazyTensors, names: Iterable[str]) -> Renamed:
    """Some tensors of `source` under their own names."""
    return Renamed(source, {name: name for name in names})


class Joined(Placed[LazyTensors]):
    """The tensors of several sources, one after another; names must differ."""

    def __init__(self, *sources: LazyTensors) -> None:
        super().__init__({name: source for source in sources for name in source})

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        return self._places[name][name]

    def blocks(self, name: str) -> Iterator[Tensor]:
        """As its source gives them."""
        return self._places[name].blocks(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._places[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements."""
        return self._places[name].dtype(name)


class Cast(Renamed):
    """The same tensors in another type.

    Args:
        source: Where they are read.
        dtype: Of the floating-point ones; whole numbers stay.
    """

    def __init__(self, source: LazyTensors, dtype: torch.dtype) -> None:
        super().__init__(source, {name: name for name in source})
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor and cast it."""
        return super().__getitem__(name).to(self.dtype(name))

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Cast one tensor block by block."""
        for block in self._source.blocks(name):
            yield block.to(self.dtype(name))

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements."""
        stored = super().dtype(name)
        return self._dtype if stored.is_floating_point else stored


class Finite(Renamed):
    """The same tensors; NaN and infinities are counted as tensors are read."""

    def __init__(self, source: LazyTensors) -> None:
        super().__init__(source, {name: name for name in source})
        self._counts: dict[str, tuple[int, int]] = {}

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor and look at its numbers."""
        tensor = super().__getitem__(name)
        self._counts.pop(name, None)
        for block in blocks_of(tensor):
            self._count(name, block)
        return tensor

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Look at one tensor block by block."""
        self._counts.pop(name, None)
        for block in self._source.blocks(name):
            self._count(name, block)
            yield block

    @property
    def problems(self) -> dict[str, str]:
        """Tensor to what is wrong with it, of those that were read."""
        found = {}
        for name, counts in self._counts.items():
            kinds = zip(counts, ("NaN", "infinite"), strict=True)
            parts = " and ".join(f"{count} {kind}" for count, kind in kinds if count)
            found[name] = f"{parts} of {torch.Size(self.shape(name)).numel()} numbers"
        return found

    def _count(self, name: str, block: Tensor) -> None:
        """Add what is not finite in a block; both extremes are finite where all numbers are."""
        if not block.is_floating_point() or not block.numel():
            return
        least, most = torch.aminmax(block)
        if math.isfinite(least.item()) and math.isfinite(most.item()):
            return
        nan, infinite = self._counts.get(name, (0, 0))
        self._counts[name] = (nan + int(block.isnan().sum()), infinite + int(block.isinf().sum()))


def blocks_of(tensor: Tensor) -> Iterator[Tensor]:
    """See `LazyTensors.blocks`."""
    rows = tensor.reshape(1) if tensor.ndim == 0 else tensor
    width = rows[:1].numel() * rows.element_size()
    for block in rows.split(max(1, BLOCK_BYTES // max(1, width))):
        yield block.contiguous()


def ahead(blocks: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same blocks, made by another thread while the caller is busy with those before."""
    with ThreadPoolExecutor(1) as thread:
        pending = deque(thread.submit(next, blocks, None) for _ in range(BLOCKS_AHEAD))
        while (block := pending.popleft().result()) is not None:
            pending.append(thread.submit(next, blocks, None))
            yield block


def whole(runs: Sequence[Tensor]) -> Tensor:
    """Runs of rows as one tensor; one run alone as it is, contiguous."""
    return runs[0].contiguous() if len(runs) == 1 else torch.cat(list(runs))


def raw_bytes(block: Tensor) -> NDArray[np.uint8]:
    """The bytes of a contiguous tensor's elements, without a copy where it is on the CPU."""
    flat: NDArray[np.uint8] = block.detach().to("cpu").reshape(-1).view(torch.uint8).numpy()
    return flat


def refuse_problems(where: Path, problems: Mapping[str, str]) -> None:
    """Raise `ConversionError` that names every tensor of `problems`."""
    if problems:
        listed = "; ".join(f"{name} has {what}" for name, what in sorted(problems.items()))
        raise ConversionError(f"{where} holds numbers that are not finite: {listed}")
