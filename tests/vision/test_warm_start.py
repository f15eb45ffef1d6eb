"""A warm start from an image MoVQ gives its codes and its pixels, and can be trained on."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from emu3_megatron.errors import UserError
from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig
from emu3_megatron.vision.codebook import EmaCodebook
from emu3_megatron.vision.training import VisionTrainer
from emu3_megatron.vision.training_config import LossConfig, ScheduleConfig
from emu3_megatron.vision.warm_start import warm_start
from tests.vision.test_training import config, squares

MODEL = VisionTokenizerConfig(
    channels=32, channel_multiplier=(1, 1, 2), num_res_blocks=1, attention_resolutions=(2,), codebook_size=256
)
CODES = 160


class ImageMoVQ(nn.Module):
    """The image model of a tokenizer's architecture: 1x1 convolutions around the codebook, no time."""

    def __init__(self, shape: VisionTokenizerConfig) -> None:
        super().__init__()
        tokenizer = VisionTokenizer(dataclasses.replace(shape, codebook_size=CODES))
        self.encoder, self.decoder = tokenizer.encoder, tokenizer.decoder
        self.quantize = tokenizer.quantize
        self.quant_conv = nn.Conv2d(shape.z_channels, shape.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(shape.embed_dim, shape.z_channels, 1)

    def latents(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder.frames(x))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and pixels."""
        z = self.latents(x).movedim(1, -1)
        codes = torch.cdist(z.flatten(0, -2), self.quantize.embedding.weight).argmin(1).view(z.shape[:-1])
        return codes, self.decode(codes)

    def decode(self, codes: Tensor) -> Tensor:
        quantized = self.quantize.embedding(codes).movedim(-1, 1)
        return self.decoder.frames(self.post_quant_conv(quantized), quantized)

    def published(self) -> dict[str, Tensor]:
        """Its tensors in MoVQGAN's names: attention as 1x1 convolutions, nothing of time."""
        weights = {k: v.clone() for k, v in self.state_dict().items() if ".time_" not in k}
        for name, value in weights.items():
            if name.endswith(("q.weight", "k.weight", "v.weight", "proj_out.weight")) and value.dim() == 2:
                weights[name] = value[:, :, None, None]
        return weights


@pytest.fixture(scope="module")
def movq() -> ImageMoVQ:
    torch.manual_seed(0)
    model = ImageMoVQ(MODEL).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    rows = model.latents(torch.rand(8, 3, 32, 32) * 2 - 1).movedim(1, -1).flatten(0, -2)
    model.quantize.embedding.weight.copy_(rows[torch.randperm(len(rows))[:CODES]])
    return model


def started(path: Path, shape: VisionTokenizerConfig = MODEL) -> VisionTokenizer:
    torch.manual_seed(1)
    tokenizer = VisionTokenizer(shape)
    start = warm_start(tokenizer, path)
    codebook = EmaCodebook(tokenizer.codebook.data, decay=0.9, seed=0)
    codebook.adopt(start.codes)
    assert start.codes == CODES
    return tokenizer


def write(weights: dict[str, Tensor], folder: Path, name: str = "movq.ckpt") -> Path:
    path = folder / name
    torch.save({"state_dict": weights, "global_step": 7}, path)
    return path


@pytest.mark.parametrize("frames", [1, 2, 4, 8])
def test_still_images_keep_their_codes_and_pixels(movq: ImageMoVQ, tmp_path: Path, frames: int) -> None:
    shape = dataclasses.replace(MODEL, temporal_downsample_factor=frames)
    tokenizer = started(write(movq.published(), tmp_path), shape)
    torch.manual_seed(2)
    for size in ((32, 32), (20, 44), (4, 4)):
        x = torch.rand(3, 3, *size) * 2 - 1
        codes, pixels = movq(x)
        torch.testing.assert_close(
            tokenizer.encode_latents(x)[:, :, 0], movq.latents(x), rtol=1e-4, atol=1e-4
        )
        assert torch.equal(tokenizer.encode(x), codes)
        torch.testing.assert_close(tokenizer.decode(codes), pixels, rtol=0, atol=1e-3)
        clip = x[:, None].repeat(1, frames, 1, 1, 1)
        assert torch.equal(tokenizer.encode(clip)[:, 0], codes), "a clip at rest is its picture"
        assert (tokenizer.decode(codes[:, None]) - pixels[:, None]).abs().max() < 1e-3
    assert codes.numel() > 2


def test_every_way_of_writing_the_file_is_read(movq: ImageMoVQ, tmp_path: Path) -> None:
    weights = movq.published()
    expected = started(write(weights, tmp_path)).fingerprint
    save_file({f"movq.{k}": v.contiguous() for k, v in weights.items()}, tmp_path / "movq.safetensors")
    assert started(tmp_path / "movq.safetensors").fingerprint == expected
    averaged = {
        f"ema_{k.split('.', 1)[0]}.{k.split('.', 1)[1].replace('.', '')}": v for k, v in weights.items()
    }
    raw = {k: v + 1 for k, v in weights.items()} | {"loss.discriminator.x": torch.zeros(1)}
    assert started(write(raw | averaged, tmp_path)).fingerprint == expected


def test_a_whole_tokenizer_is_taken_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(3)
    small = VisionTokenizer(dataclasses.replace(MODEL, codebook_size=CODES))
    small.save_pretrained(tmp_path)
    grown = started(tmp_path)
    x = torch.rand(1, 8, 3, 16, 16) * 2 - 1
    assert torch.equal(grown.encode(x), small.encode(x))
    assert torch.equal(grown.decode(small.encode(x)), small.decode(small.encode(x)))


def test_training_goes_on_from_it_and_fills_the_new_rows(movq: ImageMoVQ, tmp_path: Path) -> None:
    dataset = squares(40, 6, size=32)
    path = write(movq.published(), tmp_path)
    run = config(
        tmp_path / "run",
        model=MODEL,
        warm_start=str(path),
        data=dataclasses.replace(config(tmp_path).data, height=32, width=32),
        schedule=ScheduleConfig(
            steps=40, batch_size=8, clip_batch_size=2, crop=None, whole_batch_size=8, learning_rate=1e-3
        ),
        loss=LossConfig(continuous_steps=0, revive_every=2, codebook_decay=0.8),
        log_every=5,
    )
    trainer = VisionTrainer(run, dataset)
    first = trainer.train_step()
    assert torch.isfinite(first["gradient_norm"])
    trainer.step += 1
    losses = [float(first["loss"])]
    while trainer.step < 40:
        losses.append(float(trainer.train_step()["loss"]))
        trainer.step += 1
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]
    placed = trainer.tokenizer.codebook[CODES:].abs().amax(1) < 1e3
    assert placed.float().mean() > 0.5
    time = dict(trainer.tokenizer.named_parameters())
    assert all(torch.isfinite(value).all() for value in time.values())


def test_what_does_not_fit_is_named(movq: ImageMoVQ, tmp_path: Path) -> None:
    path = write(movq.published(), tmp_path)
    for shape, message in (
        (dataclasses.replace(MODEL, channels=64), r"encoder\.conv_in\.weight has shape \[32, 3, 3, 3\]"),
        (dataclasses.replace(MODEL, codebook_size=64), r"embedding\.weight has shape \[160, 4\].*\[64, 4\]"),
        (dataclasses.replace(MODEL, num_res_blocks=2), "is missing"),
    ):
        with pytest.raises(UserError, match=message):
            warm_start(VisionTokenizer(shape), path)
    tokenizer = VisionTokenizer(MODEL)
    with pytest.raises(UserError, match="no such file"):
        warm_start(tokenizer, tmp_path / "none.pt")
    with pytest.raises(UserError, match="is it an image MoVQ"):
        warm_start(tokenizer, write({"a": torch.zeros(1)}, tmp_path))
    (tmp_path / "text.pt").write_text("x" * 100)
    with pytest.raises(UserError, match="warm_start"):
        warm_start(tokenizer, tmp_path / "text.pt")
    torch.save({"state_dict": {}, "callbacks": Fraction(1, 2)}, tmp_path / "unsafe.ckpt")
    with pytest.raises(UserError, match="save its state_dict alone"):
        warm_start(tokenizer, tmp_path / "unsafe.ckpt")


def test_growth_does_not_change_the_codes_of_any_latent(movq: ImageMoVQ, tmp_path: Path) -> None:
    tokenizer = started(write(movq.published(), tmp_path))
    rows = 5 * torch.randn(1, 4, 1, 10, 10)
    assert int(tokenizer.codes_of(rows).max()) < CODES
