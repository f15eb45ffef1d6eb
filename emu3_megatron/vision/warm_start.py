"""First weights from an image MoVQ, or from a whole vision tokenizer.

The layers over time, which an image MoVQ lacks, begin as the identity: a still image becomes the codes and
the pixels that the MoVQ gives. They have a swish after every resampling, which is no identity, but for small
values it is half of its argument: the layer before each chain of swishes scales latents down to `SMALL`, the
layer after it scales them up again. Small weights have to be learned in small steps and large ones in large
steps, hence the units that go to the optimizer.

Emu3's own tokenizer began with the 270M model of MoVQGAN (https://github.com/ai-forever/MoVQGAN), whose names
of tensors are read here: `encoder.*`, `decoder.*`, `quantize.embedding`, `quant_conv`, `post_quant_conv`.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from emu3_megatron.errors import UserError, one_line
from emu3_megatron.vision.averages import CODEBOOK
from emu3_megatron.vision.checkpoint import PROJECTION, read_safetensors
from emu3_megatron.vision.layers import CausalConv3d, SpatialNorm
from emu3_megatron.vision.model import VisionTokenizer

SMALL = 2.0**-20
"""Scale of latents between the layers over time, over their own."""

NEW = ("encoder.time_", "decoder.time_")
"""First parts of the names of what an image MoVQ lacks."""

FLATTENED = ("quant_conv", "post_quant_conv")
"""Convolutions over time that are 1x1 convolutions in an image MoVQ."""


@dataclass(frozen=True)
class WarmStart:
    """What was loaded."""

    codes: int
    """Rows of the codebook that were loaded, the first ones; the others have no place yet."""
    units: Mapping[str, float]
    """Parameters that are not measured in 1, for `make_optimizer`."""


def warm_start(tokenizer: VisionTokenizer, path: Path) -> WarmStart:
    """Overwrite the tokenizer's weights, in place.

    Args:
        tokenizer: of the architecture that was stored, and a codebook of at least as many rows.
        path: a file of an image MoVQ (safetensors, or a torch file of tensors, maybe below ``state_dict``;
            moving averages are preferred where it has them), or the folder of a vision tokenizer.

    Raises:
        UserError: the file cannot be read, or does not fit the tokenizer.
    """
    if path.is_dir():
        stored = VisionTokenizer.from_pretrained(path).state_dict()
        return WarmStart(codes=_adopt(tokenizer, stored, path, new=()), units={})
    codes = _adopt(tokenizer, _movq_weights(path, tokenizer), path, new=NEW)
    with torch.no_grad():
        return WarmStart(codes=codes, units=_make_time_identity(tokenizer))


def _adopt(tokenizer: VisionTokenizer, stored: Mapping[str, Tensor], path: Path, new: tuple[str, ...]) -> int:
    """Copy `stored` into the tokenizer; give the rows of the stored codebook."""
    for name, target in tokenizer.state_dict().items():
        if name.startswith(new):
            continue
        value = stored.get(name)
        if value is None:
            raise UserError(f"warm_start {path}: tensor {name} is missing; is it of another architecture?")
        value = value.to(target.dtype)
        if name == CODEBOOK and value.shape[1:] == target.shape[1:] and len(value) <= len(target):
            target[: len(value)].copy_(value)
            continue
        if new and name.split(".")[0] in FLATTENED and value.dim() == 4:
            value = nn.functional.pad(value[:, :, None], (0, 0, 0, 0, target.shape[2] - 1, 0))
        if PROJECTION.search(name) and value.dim() == 4:
            value = value[:, :, 0, 0]
        if value.shape != target.shape:
            raise UserError(
                f"warm_start {path}: tensor {name} has shape {list(value.shape)}, the model of this "
                f"configuration {list(target.shape)}; set `model` to the architecture that was stored "
                "(its codebook may only grow)"
            )
        target.copy_(value)
    return len(stored[CODEBOOK])


def _movq_weights(path: Path, tokenizer: VisionTokenizer) -> dict[str, Tensor]:
    """Tensors of the file under our names; the moving averages where it has them."""
    stored = _read(path)
    ends = [key for key in stored if key.endswith("encoder.conv_in.weight")]
    if not ends:
        raise UserError(f"warm_start {path}: there is no tensor encoder.conv_in.weight; is it an image MoVQ?")
    prefix = min(ends, key=len).removesuffix("encoder.conv_in.weight")
    found: dict[str, Tensor] = {}
    for name in tokenizer.state_dict():
        part, _, rest = name.replace("_conv.conv.", "_conv.").partition(".")
        averaged = f"{prefix}ema_{part}.{rest.replace('.', '')}"
        value = stored.get(averaged, stored.get(f"{prefix}{part}.{rest}"))
        if value is not None:
            found[name] = value
    return found


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"warm_start is {path}: no such file or folder; correct the path")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"warm_start {path}: it holds more than tensors, which is not safe to load "
            f"({one_line(error)[:80]}); save its state_dict alone"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise UserError(f"warm_start {path}: not a file of weights ({one_line(error)[:80]})") from error
    stored = stored.get("state_dict", stored)
    return {key: value for key, value in stored.items() if isinstance(value, Tensor)}


def _make_time_identity(tokenizer: VisionTokenizer) -> dict[str, float]:
    """Let the layers over time pass every latent; give the units of the weights that this makes unusual."""
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    for block in (*encoder.time_res_stack, *decoder.time_res_stack):
        for parameter in block.get_submodule("conv2").parameters():
            parameter.zero_()
    if tokenizer.config.temporal_steps == 0:
        return {}
    units: dict[nn.Parameter, float] = {}
    for stack, taps in ((encoder.time_conv, 2), (decoder.time_conv, 1)):
        for index, layer in enumerate(stack):
            conv = layer.get_submodule("conv.conv")
            # A swish halves small values, so each of these layers doubles them.
            _pass_through(layer.get_submodule("conv"), 2.0 * (SMALL if index == 0 else 1.0), taps)
            units[conv.get_parameter("weight")] = SMALL if index == 0 else 1.0
            units[conv.get_parameter("bias")] = SMALL
    for block in encoder.time_res_stack:
        norm = block.get_submodule("norm1")
        assert isinstance(norm, nn.BatchNorm3d)
        assert norm.running_var is not None
        norm.running_var.fill_(SMALL**2)
        norm.weight.fill_((SMALL**2 + norm.eps) ** 0.5 / SMALL)
        units[norm.weight] = float(norm.weight[0])
        units |= dict.fromkeys(block.get_submodule("conv2").parameters(), SMALL)
    readers: list[nn.Module] = [tokenizer.quant_conv.conv, decoder.conv_in]
    for module in decoder.modules():
        if isinstance(module, SpatialNorm):
            readers += [module.conv_y, module.conv_b]
    for reader in readers:
        weight = reader.get_parameter("weight")
        weight.div_(SMALL)
        units[weight] = 1 / SMALL
    return {name: units[p] for name, p in tokenizer.named_parameters() if units.get(p, 1.0) != 1.0}


def _pass_through(module: nn.Module, gain: float, taps: int) -> None:
    """Weights that average the last `taps` frames of the kernel, at its centre, channel by channel."""
    assert isinstance(module, CausalConv3d)
    weight: Tensor = module.conv.weight
    centre = weight.shape[-1] // 2
    weight.zero_()
    weight[:, :, -taps:, centre, centre] = torch.eye(len(weight))[:, :, None] * (gain / taps)
    module.conv.get_parameter("bias").zero_()
