"""Two checkpoints compared tensor by tensor, of whatever kind each is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import torch
from torch import Tensor

from emu3_megatron.conversion import configuration
from emu3_megatron.conversion.checkpoints import check_files, checkpoint_weights
from emu3_megatron.conversion.companions import VISION, kept_folder, read_json
from emu3_megatron.conversion.lazy import InMemory, Joined, LazyTensors, Renamed, blocks_of, raw_bytes, select
from emu3_megatron.conversion.maps import LAYOUTS, VISION_PREFIXES, WeightMap
from emu3_megatron.conversion.tensor_files import open_tensors
from emu3_megatron.conversion.vision_files import is_vision_tokenizer, open_vision_tokenizer
from emu3_megatron.errors import UserError
from emu3_megatron.training.checkpoint_files import resolve

BLOCK = 1 << 20
"""Elements that are compared together."""

_VISION = "vqmodel."
"""What the names of the vision tokenizer's tensors begin with in a comparison."""


@dataclass(frozen=True)
class Comparison:
    """What was found of two checkpoints that are equal in what both can hold."""

    tensors: int
    numbers: int
    checksum: str
    """SHA-256 over names, types, shapes and CRC-32C of all tensors, in the order of names."""
    is_vision_compared: bool


def compare(first: Path, second: Path) -> Comparison:
    """Compare the weights of two runs, checkpoints or Hugging Face folders, bit by bit.

    Tensors bear the released names, so folders of different layouts compare as equal when their numbers are.
    The vision tokenizer is compared where both have a place for it. One tensor of each is in memory at a
    time.

    Raises:
        UserError: they differ; the message names the first difference.
        ValueError: one of them cannot be read.
    """
    with ExitStack() as opened:
        one, other = _open(first, opened), _open(second, opened)
        has_vision = [any(name.startswith(_VISION) for name in side) for side in (one, other)]
        lacks = [_lacks_vision(path) for path in (first, second)]
        both = all(has_vision) or not any(lacks)
        if not both:
            one, other = (
                select(side, [n for n in side if not n.startswith(_VISION)]) for side in (one, other)
            )
        checksums: dict[str, str] = {}
        difference = first_difference(one, other, checksums)
        if difference is not None:
            raise UserError(f"{first} and {second} differ: {difference}")
        digest = hashlib.sha256()
        for name in sorted(one):
            digest.update(f"{name} {one.dtype(name)} {list(one.shape(name))} {checksums[name]}\n".encode())
        numbers = sum(torch.Size(one.shape(name)).numel() for name in one)
        return Comparison(len(one), numbers, digest.hexdigest(), both and all(has_vision))


def first_difference(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], checksums: dict[str, str] | None = None
) -> str | None:
    """The first way in which two sets of tensors differ, in words; None where they are equal bit by bit.

    Names come first, then shapes and types, then numbers, each in the order of names. `checksums` is filled
    with those of the tensors that were read and are equal.
    """
    left = one if isinstance(one, LazyTensors) else InMemory(one)
    right = other if isinstance(other, LazyTensors) else InMemory(other)
    names = [set(left), set(right)]
    for name in sorted(names[0] ^ names[1]):
        return f"{name} is only in the {'second' if name not in names[0] else 'first'}"
    for name in sorted(names[0]):
        if left.shape(name) != right.shape(name):
            shapes = list(left.shape(name)), list(right.shape(name))
            return f"{name} has shape {shapes[0]} in the first, {shapes[1]} in the second"
        if left.dtype(name) != right.dtype(name):
            return f"{name} is {left.dtype(name)} in the first, {right.dtype(name)} in the second"
    for name in sorted(names[0]):
        tensor = left[name]
        if difference := _different_numbers(tensor, right[name]):
            return f"{name} differs: {difference}"
        if checksums is not None:
            checksums[name] = checksum(tensor)
    return None


def checksum(tensor: Tensor) -> str:
    """CRC-32C of a tensor's elements, eight hexadecimal digits."""
    value = 0
    for block in blocks_of(tensor):
        value = google_crc32c.extend(value, raw_bytes(block))
    return f"{value:08x}"


def _different_numbers(left: Tensor, right: Tensor) -> str | None:
    """How two tensors of one shape and type differ, in words."""
    pairs = [side.detach().contiguous().reshape(-1) for side in (left, right)]
    count, first, largest = 0, -1, 0.0
    width = left.element_size()
    for begin in range(0, len(pairs[0]), BLOCK):
        one, other = (side[begin : begin + BLOCK] for side in pairs)
        bits = [side.view(torch.uint8).view(-1, width) for side in (one, other)]
        if torch.equal(*bits):
            continue
        places = (bits[0] != bits[1]).any(1).nonzero().flatten()
        if first < 0:
            first = begin + int(places[0])
        count += len(places)
        largest = max(largest, float((one[places].double() - other[places].double()).abs().max()))
    if count == 0:
        return None
    index = [int(place) for place in torch.unravel_index(torch.tensor(first), left.shape)]
    values = pairs[0][first].item(), pairs[1][first].item()
    return (
        f"{count} of {left.numel()} numbers, by at most {largest:.3g}, first at {index} ({values[0]!r} and "
        f"{values[1]!r}); CRC-32C {checksum(left)} and {checksum(right)}"
    )


def _open(path: Path, opened: ExitStack) -> LazyTensors:
    """The tensors of a checkpoint of any kind, under released names; what must be closed goes to `opened`."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run, a checkpoint or a Hugging Face folder")
    if not (path / "config.json").is_file():
        return _open_run(path, opened)
    if is_vision_tokenizer(read_json(path / "config.json")):
        return _vision(path)
    files = open_tensors(path)
    for name, layout in LAYOUTS.items():
        if layout.rename("model.embed_tokens.weight") not in files:
            continue
        names = {}
        vision = VISION_PREFIXES.get(name)
        for own in files:
            if vision is not None and own.startswith(vision):
                names[_VISION + own[len(vision) :]] = own
            else:
                names[layout.released(own)] = own
        return Renamed(files, names)
    return files


def _open_run(path: Path, opened: ExitStack) -> LazyTensors:
    """The weights of a run in released names, and the vision tokenizer that was imported with it."""
    checkpoint = resolve(path)
    check_files(checkpoint)
    weights, config, vocabulary = opened.enter_context(checkpoint_weights(checkpoint))
    weight_map = WeightMap(configuration.architecture(config, vocabulary), LAYOUTS["emu3"])
    tensors: LazyTensors = weight_map.theirs(weights)
    vision = kept_folder(checkpoint, VISION)
    return tensors if vision is None else Joined(tensors, _vision(vision))


def _vision(folder: Path) -> Renamed:
    _, tensors = open_vision_tokenizer(folder)
    return Renamed(tensors, {_VISION + name: name for name in tensors})


def _lacks_vision(path: Path) -> bool:
    """Whether a checkpoint by its kind has no vision tokenizer: a run that was not imported with one, or a
    folder in the released layout."""
    if not (path / "config.json").is_file():
        return kept_folder(resolve(path), VISION) is None
    values = read_json(path / "config.json")
    return not is_vision_tokenizer(values) and "vq_config" not in values
