"""`transformers.Emu3VQVAE` as the reference, with weights that exercise every term."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig

TINY = VisionTokenizerConfig(
    channels=32, channel_multiplier=(1, 1, 2), num_res_blocks=1, attention_resolutions=(2,), codebook_size=512
)


def reference(config: VisionTokenizerConfig, seed: int = 0) -> Emu3VQVAE:
    """Random weights; batch-norm statistics off their defaults; the codebook at the latents' scale."""
    torch.manual_seed(seed)
    values = {k: v for k, v in config.to_transformers().items() if k not in ("architectures", "model_type")}
    model = Emu3VQVAE(Emu3VQVAEConfig(**values)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm3d):
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 2.0)
            if getattr(module, "weight", None) is not None and "Norm" in type(module).__name__:
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
    ours = adopt(model, config)
    size = 8 * config.spatial_factor
    with torch.no_grad():
        latents = ours.encode_latents(torch.rand(2, 3, size, size) * 2 - 1).movedim(1, -1).flatten(0, -2)
        spread = latents.std(0) * torch.randn(config.codebook_size, config.embed_dim)
        model.quantize.embedding.weight.copy_(latents.mean(0) + spread)
    return model


def adopt(model: Emu3VQVAE, config: VisionTokenizerConfig) -> VisionTokenizer:
    """Our tokenizer with the weights of `model`, by way of a folder."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours = VisionTokenizer.from_pretrained(Path(folder))
    assert ours.config == config
    return ours


def reference_codes(model: Emu3VQVAE, pixels: torch.Tensor) -> torch.Tensor:
    """Codes [B, h, w] or [B, t, h, w], uncropped."""
    return _quantized(model, pixels)[0]


def _quantized(model: Emu3VQVAE, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and the latents [B, t, D, h, w] that were quantized."""
    kept = SimpleNamespace()

    def keep(_: object, latents: tuple[torch.Tensor], codes: torch.Tensor) -> None:
        kept.latents, kept.codes = latents[0], codes

    with torch.no_grad():
        # `encode` crops to the images' sizes and mishandles clips there: keep what the quantizer said.
        hook = model.quantize.register_forward_hook(keep)
        model.encode(pixels, image_sizes=torch.tensor([pixels.shape[-2:]] * len(pixels)))
        hook.remove()
    return (kept.codes.squeeze(1) if pixels.dim() == 4 else kept.codes), kept.latents


def count_near_ties(model: Emu3VQVAE, pixels: torch.Tensor, codes: torch.Tensor) -> int:
    """How many codes differ from the reference's; asserts that each of them is a near tie.

    That is, one of the two nearest, whose distances differ by less than 1e-6 relative in fp64.
    """
    theirs, latents = _quantized(model, pixels)
    assert codes.shape == theirs.shape
    rows = latents.movedim(2, -1).flatten(0, -2)[(codes != theirs).flatten()].double()
    book = model.quantize.embedding.weight.double()
    distances, order = torch.cdist(rows, book).square().topk(2, largest=False)
    chosen = codes[codes != theirs]
    assert (order == chosen[:, None]).any(1).all(), "a code is none of the reference's two nearest"
    assert (distances[:, 1] - distances[:, 0] <= 1e-6 * distances[:, 0]).all(), "a code differs without a tie"
    return len(chosen)
