"""The vision tokenizer's tensors, alone or in a model's folder, in either public layout, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from emu3_megatron.conversion.lazy import InMemory, LazyTensors, Renamed
from emu3_megatron.conversion.maps import VISION_PREFIXES
from emu3_megatron.conversion.processes import on_first
from emu3_megatron.conversion.publish import publish_folder
from emu3_megatron.conversion.rules import ConversionError
from emu3_megatron.conversion.tensor_files import open_tensors, write_tensors
from emu3_megatron.files import write_json_atomic
from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig
from emu3_megatron.vision.checkpoint import CONFIG_FILE, Layout, load_config, to_layout, transformers_key


class _Reshaped(Renamed):
    """The same tensors as other shapes of as many elements."""

    def __init__(
        self, source: LazyTensors, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        super().__init__(source, names)
        self._shapes = shapes

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        return super().__getitem__(name).reshape(self._shapes[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._shapes[name]


def is_vision_tokenizer(values: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a vision tokenizer alone."""
    return values.get("model_type") in ("emu3_vqgan", "Emu3VisionVQ")


def vision_tensors(
    stored: LazyTensors, config: VisionTokenizerConfig, where: Path, layout: Layout = "transformers"
) -> LazyTensors:
    """A vision tokenizer's tensors in a layout, from a file in either.

    Args:
        stored: As in the file, without the prefix they have in a model's folder.
        config: Its sizes.
        where: For messages.
        layout: Of the names and shapes.

    Raises `ConversionError` that lists all missing, unexpected and mis-shaped tensors at once.
    """
    state = dict(_empty(config).state_dict())
    public = {kind: to_layout(state, kind) for kind in get_args(Layout)}
    wanted = public[layout]
    names: dict[str, str] = {}
    problems: list[str] = []
    for released in state:
        theirs = transformers_key(released)
        name = theirs if layout == "transformers" else released
        found = next((known for known in (theirs, released) if known in stored), None)
        if found is None:
            problems.append(f"missing {theirs} {list(public['transformers'][theirs].shape)}")
            continue
        names[name] = found
        shapes = (public["transformers"][theirs].shape, public["emu3"][released].shape)
        if stored.shape(found) not in shapes:
            problems.append(
                f"{found} has shape {list(stored.shape(found))}, expected {list(wanted[name].shape)}"
            )
    used = set(names.values())
    problems += [f"unexpected {name}" for name in stored if name not in used]
    if problems:
        raise ConversionError(
            f"{where}: the vision tokenizer's tensors do not fit its configuration: " + "; ".join(problems)
        )
    return _Reshaped(stored, names, {name: tuple(wanted[name].shape) for name in names})


def open_vision_tokenizer(
    source: VisionTokenizer | str | Path, layout: Layout = "transformers"
) -> tuple[VisionTokenizerConfig, LazyTensors]:
    """Configuration and tensors of a vision tokenizer: one in memory, its folder, or a model's folder.

    Raises `ConversionError` when the folder is damaged.
    """
    if isinstance(source, VisionTokenizer):
        stored: LazyTensors = InMemory(dict(source.state_dict()))
        return source.config, vision_tensors(stored, source.config, Path("memory"), layout)
    folder = Path(source)
    if not (folder / CONFIG_FILE).is_file():
        raise ConversionError(f"{folder / CONFIG_FILE} is missing; give the folder of a vision tokenizer")
    config = load_config(folder)
    stored = open_tensors(folder)
    for prefix in VISION_PREFIXES.values():
        if any(name.startswith(prefix) for name in stored):
            stored = strip(stored, prefix)
    return config, vision_tensors(stored, config, folder, layout)


def strip(stored: LazyTensors, prefix: str) -> Renamed:
    """The tensors whose name starts with `prefix`, without it."""
    names = [name for name in stored if name.startswith(prefix)]
    return Renamed(stored, {name[len(prefix) :]: name for name in names})


def write_vision_tokenizer(
    folder: Path, config: VisionTokenizerConfig, tensors: LazyTensors, layout: Layout = "transformers"
) -> None:
    """Fill an existing folder that is not published; all processes call it together."""
    write_tensors(folder, tensors)
    values = config.to_transformers() if layout == "transformers" else config.to_emu3()
    floating = next(tensors.dtype(name) for name in tensors if tensors.dtype(name).is_floating_point)
    values["torch_dtype"] = str(floating).removeprefix("torch.")
    on_first(lambda: write_json_atomic(folder / CONFIG_FILE, values))


def convert_vision_tokenizer(
    source: str | Path, folder: str | Path, *, layout: Layout, overwrite: bool = False
) -> Path:
    """Write a vision tokenizer's folder in the other layout, or in the same; whole or not at all.

    Raises:
        ConversionError: the folder is damaged.
        UserError: `folder` exists.
    """
    config, tensors = open_vision_tokenizer(source, layout)
    with publish_folder(folder, overwrite=overwrite) as unfinished:
        write_vision_tokenizer(unfinished, config, tensors, layout)
    return Path(folder)


def _empty(config: VisionTokenizerConfig) -> VisionTokenizer:
    """A vision tokenizer without memory for its weights."""
    with torch.device("meta"):
        return VisionTokenizer(config)
