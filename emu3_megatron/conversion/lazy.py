"""Tensors that are read when asked for; their names, shapes and types are known without reading."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from emu3_megatron.conversion.rules import ConversionError

BLOCK = 1 << 24
"""Elements that are looked at together where a whole tensor would need a copy of itself."""


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

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name; does not read it."""
        return any(name == own for own in self)


class InMemory(LazyTensors):
    """A plain state dict."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, detached."""
        return self._tensors[name].detach()

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name."""
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements."""
        return self._tensors[name].dtype


class Renamed(LazyTensors):
    """Some tensors of another, under other names.

    Args:
        source: Where they are read.
        names: New name to the name in `source`, in order.
    """

    def __init__(self, source: LazyTensors, names: Mapping[str, str]) -> None:
        self._source, self._names = source, dict(names)

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        return self._source[self._names[name]]

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
        return self._source.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements."""
        return self._source.dtype(self._names[name])


def select(source: LazyTensors, names: Iterable[str]) -> Renamed:
    """Some tensors of `source` under their own names."""
    return Renamed(source, {name: name for name in names})


class Joined(LazyTensors):
    """The tensors of several sources, one after another; names must differ."""

    def __init__(self, *sources: LazyTensors) -> None:
        self._owner = {name: source for source in sources for name in source}

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        return self._owner[name][name]

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._owner)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._owner)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._owner[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements."""
        return self._owner[name].dtype(name)


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

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements."""
        stored = super().dtype(name)
        return self._dtype if stored.is_floating_point else stored


class Finite(Renamed):
    """The same tensors; those with a NaN or an infinity are noted when they are read."""

    def __init__(self, source: LazyTensors) -> None:
        super().__init__(source, {name: name for name in source})
        self.problems: dict[str, str] = {}
        """Tensor to what is wrong with it, of those that were read."""

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor and look at its extremes: both are finite where all elements are."""
        tensor = super().__getitem__(name)
        if tensor.is_floating_point() and tensor.numel():
            least, most = torch.aminmax(tensor)
            if not (torch.isfinite(least) and torch.isfinite(most)):
                self.problems[name] = _count_problems(tensor)
        return tensor


def _count_problems(tensor: Tensor) -> str:
    """How many elements are NaN and infinite, in words."""
    nan = infinite = 0
    for block in tensor.reshape(-1).split(BLOCK):
        nan += int(block.isnan().sum())
        infinite += int(block.isinf().sum())
    parts = [f"{count} {kind}" for count, kind in ((nan, "NaN"), (infinite, "infinite")) if count]
    return f"{' and '.join(parts)} of {tensor.numel()} numbers"


def refuse_problems(where: Path, problems: Mapping[str, str]) -> None:
    """Raise `ConversionError` that names every tensor of `problems`."""
    if problems:
        listed = "; ".join(f"{name} has {what}" for name, what in sorted(problems.items()))
        raise ConversionError(f"{where} holds numbers that are not finite: {listed}")
