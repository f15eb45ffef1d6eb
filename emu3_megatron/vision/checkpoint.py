"""Checkpoints of the vision tokenizer: folders of ``config.json`` and safetensors, in two public layouts.

Our modules bear the released names. The layout of `transformers` differs by the renames of `RENAMES`, and by
the attention projections: 1x1 convolutions [C, C, 1, 1] as released, matrices [C, C] here and in
`transformers`.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from emu3_megatron.errors import UserError, one_line
from emu3_megatron.files import atomic_write, parse_json, write_json_atomic
from emu3_megatron.vision.config import VisionTokenizerConfig

if TYPE_CHECKING:
    from emu3_megatron.vision.model import VisionTokenizer

Layout = Literal["transformers", "emu3"]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

LFS_POINTER = b"version https://git-lfs"
"""How the file begins that git leaves where git-lfs was not run."""

RENAMES: tuple[tuple[str, str], ...] = (
    (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
    (r"^(encoder|decoder)\.mid\.attn_1\.norm\.", r"\1.middle_block.attn_norm."),
    (r"^(encoder|decoder)\.mid\.", r"\1.middle_block."),
    (r"^encoder\.down\.", r"encoder.down_block.down."),
    (r"^decoder\.up\.", r"decoder.up_block.up."),
    (r"\.([qkv])\.(weight|bias)$", r".\1_proj.\2"),
    (r"\.proj_out\.(weight|bias)$", r".out_proj.\1"),
)
"""Released name -> name in `transformers`: regular expressions, applied in this order."""

PROJECTION = re.compile(r"\.(q|k|v|proj_out)\.weight$")
"""Released names of the tensors that are 1x1 convolutions in the released layout."""


def transformers_key(key: str) -> str:
    """Name in the layout of `transformers` of a tensor whose released name is `key`."""
    for pattern, replacement in RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def to_layout(weights: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Our state dict in a public layout; views of the same memory where that is possible."""
    if layout == "transformers":
        return {transformers_key(key): value for key, value in weights.items()}
    return {k: v[:, :, None, None] if PROJECTION.search(k) else v for k, v in weights.items()}


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file, atomically, contiguous and on the CPU."""
    plain = {key: value.detach().to("cpu").contiguous() for key, value in weights.items()}
    with atomic_write(path) as stream:
        stream.write(serialise(plain, metadata={"format": "pt"}))


def save(tokenizer: VisionTokenizer, folder: Path, layout: Layout) -> None:
    """Write `tokenizer` to `folder`: the weights first, then ``config.json``."""
    if layout not in get_args(Layout):
        raise ValueError(f"layout is {layout!r}: choose one of {', '.join(get_args(Layout))}")
    dtypes = {value.dtype for value in tokenizer.state_dict().values() if value.is_floating_point()}
    if len(dtypes) > 1:
        raise ValueError(
            f"weights are {' and '.join(sorted(map(str, dtypes)))}: for_inference() has rounded some; save "
            "the tokenizer as it was loaded"
        )
    config = tokenizer.config
    save_weights(to_layout(tokenizer.state_dict(), layout), folder / WEIGHTS_FILE)
    values = config.to_transformers() if layout == "transformers" else config.to_emu3()
    values["torch_dtype"] = str(tokenizer.dtype).removeprefix("torch.")
    write_json_atomic(folder / CONFIG_FILE, values)


def load_config(folder: Path) -> VisionTokenizerConfig:
    """Read ``config.json`` of either layout."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give the folder of a vision tokenizer")
    values = _read_json(path)
    return VisionTokenizerConfig.from_dict(values.get("vq_config", values))


def load_weights(tokenizer: VisionTokenizer, folder: Path) -> None:
    """Fill `tokenizer` (its tensors may be on the meta device) from a folder in either layout."""
    stored = _read(folder)
    wanted = tokenizer.state_dict()
    found: dict[str, Tensor] = {}
    for key, like in wanted.items():
        theirs = transformers_key(key)
        value = stored.pop(theirs, None) if theirs in stored else stored.pop(key, None)
        if value is None:
            raise ValueError(
                f"{folder}: tensor {theirs} (released name {key}) is missing, its {CONFIG_FILE} asks for it: "
                "take both files from one folder, or save the tokenizer again"
            )
        if PROJECTION.search(key) and value.dim() == 4:
            value = value[:, :, 0, 0]
        if value.shape != like.shape:
            raise ValueError(
                f"{folder}: tensor {theirs} has shape {list(value.shape)}, its {CONFIG_FILE} asks for "
                f"{list(like.shape)}: the two files belong to different models; take both from one folder"
            )
        found[key] = value.contiguous()
    if stored:
        raise ValueError(
            f"{folder}: {len(stored)} unexpected tensors, the first is {min(stored)}: the weights are not "
            f"those of its {CONFIG_FILE}; take both from one folder"
        )
    tokenizer.load_state_dict(found, assign=True)
    tokenizer.requires_grad_(True)


def _read(folder: Path) -> dict[str, Tensor]:
    index = folder / INDEX_FILE
    names = sorted(set(_weight_map(index).values())) if index.is_file() else [WEIGHTS_FILE]
    weights: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: a vision tokenizer's weights are safetensors files")
        weights.update(read_safetensors(path))
    prefixes = ("model.vqmodel.", "vqmodel.")
    for prefix in prefixes:
        if any(key.startswith(prefix) for key in weights):
            return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    return weights


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: it is damaged, or no such file; the message says what it is.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: {_fault(path, 'safetensors', one_line(error))}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    data = path.read_bytes()
    try:
        values = parse_json(data)
    except ValueError as error:
        raise UserError(f"{path}: {_fault(path, 'JSON', one_line(error))}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a JSON {type(values).__name__}, not an object; copy it anew")
    return values


def _weight_map(index: Path) -> dict[str, str]:
    """Files by tensor."""
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f'{index}: has no "weight_map"; copy it anew')
    return names


def _fault(path: Path, kind: str, words: str) -> str:
    """What is wrong with a file that cannot be read as `kind`, and what to do."""
    with open(path, "rb") as stream:
        start = stream.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        return "is a git-lfs pointer, not the file itself; run 'git lfs pull' in its repository"
    return f"is cut off, damaged or no {kind} file ({words}, {path.stat().st_size} bytes); copy it anew"


def fingerprint(tokenizer: VisionTokenizer) -> str:
    """SHA-256 (hex) of the configuration and of every tensor that codes or pixels depend on."""
    digest = hashlib.sha256(json.dumps(tokenizer.config.to_emu3(), sort_keys=True).encode())
    for key, value in sorted(tokenizer.state_dict().items()):
        if key.endswith("num_batches_tracked"):
            continue
        digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
