"""Scores against their definitions, the Fréchet distance against scipy, and what the sheet shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from emu3_megatron.errors import UserError
from emu3_megatron.vision import VisionTokenizer
from emu3_megatron.vision.evaluation import (
    Evaluation,
    FeatureNetwork,
    FeatureStatistics,
    Reconstruction,
    Sample,
    evaluate,
    frechet_distance,
    table,
    to_bytes,
)
from emu3_megatron.vision.metrics import psnr, ssim
from emu3_megatron.vision.sheet import DIFFERENCE_GAIN, LINE, MARGIN, draw_sheet
from tests.vision.oracle import TINY


class MeanColour(torch.nn.Module):
    """A feature network: the mean of each channel."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.float().mean((2, 3))


def samples(count: int, *shape: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(name=f"{index}.png", pixels=torch.rand(shape, generator=generator) * 2 - 1)
        for index in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> VisionTokenizer:
    torch.manual_seed(0)
    return VisionTokenizer(TINY)


def test_scores_are_means_over_samples_whatever_the_batches(tokenizer: VisionTokenizer) -> None:
    items = samples(5, 3, 16, 20)
    decoded = [tokenizer.decode(tokenizer.encode(s.pixels[None])) for s in items]
    wanted_psnr = np.mean([psnr(y, s.pixels[None]) for y, s in zip(decoded, items, strict=True)])
    wanted_ssim = np.mean([ssim(y, s.pixels[None]) for y, s in zip(decoded, items, strict=True)])
    used = torch.cat([tokenizer.encode(s.pixels[None]).flatten() for s in items]).unique()
    for batch_pixels in (1, 700, 1 << 20):
        scores, kept = evaluate(
            tokenizer,
            items,
            perceptual=lambda x, y: (x - y).abs().mean((1, 2, 3)),
            keep=2,
            batch_pixels=batch_pixels,
        )
        assert scores.psnr == pytest.approx(wanted_psnr, rel=1e-4)
        assert scores.ssim == pytest.approx(wanted_ssim, rel=1e-3, abs=1e-4)
        assert (scores.kind, scores.size, scores.samples) == ("images", "16x20", 5)
        assert scores.codes_used == len(used)
        assert scores.codebook_usage == len(used) / TINY.codebook_size
        assert scores.lpips is not None
        assert scores.rfid is None
        assert [item.name for item in kept] == ["0.png", "1.png"]
        assert torch.equal(kept[0].original, items[0].pixels)


def test_clips_count_once_and_shapes_do_not_mix(tokenizer: VisionTokenizer) -> None:
    scores, kept = evaluate(tokenizer, samples(2, 4, 3, 12, 12), keep=1)
    assert (scores.kind, scores.samples) == ("clips", 2)
    assert kept[0].decoded.shape == (4, 3, 12, 12)
    with pytest.raises(ValueError, match="one evaluation takes one shape"):
        evaluate(tokenizer, samples(1, 3, 12, 12) + samples(1, 3, 12, 16), batch_pixels=1)
    with pytest.raises(ValueError, match="no sample was added"):
        Evaluation(tokenizer).scores()


def test_the_frechet_distance_is_that_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    b = a @ torch.randn(6, 6, generator=generator, dtype=torch.float64) + 0.5
    statistics = FeatureStatistics(), FeatureStatistics()
    for rows, one in zip((a, b), statistics, strict=True):
        for part in rows.split(150):
            one.add(part)
    x, y = a.numpy(), b.numpy()
    cx, cy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx + cy - 2 * sqrtm(cx @ cy).real)
    assert frechet_distance(*statistics) == pytest.approx(wanted, rel=1e-6)
    assert frechet_distance(statistics[0], statistics[0]) == pytest.approx(0, abs=1e-8)
    with pytest.raises(ValueError, match="rFID needs at least 2"):
        frechet_distance(FeatureStatistics(), statistics[0])


def test_a_feature_network_is_a_torchscript_file(tokenizer: VisionTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "features.pt"
    torch.jit.script(MeanColour()).save(str(path))
    network = FeatureNetwork(path)
    pictures = to_bytes(torch.rand(4, 3, 12, 12) * 2 - 1)
    torch.testing.assert_close(network(pictures), pictures.float().mean((2, 3)))
    scores, _ = evaluate(tokenizer, samples(3, 3, 12, 12), features=network)
    assert scores.rfid is not None
    assert scores.rfid > 0
    torch.jit.script(torch.nn.Flatten(0)).save(str(path))
    with pytest.raises(UserError, match="one row of features for each"):
        FeatureNetwork(path)(pictures)
    path.write_text("no network")
    with pytest.raises(UserError, match="not a TorchScript file"):
        FeatureNetwork(path)
    with pytest.raises(UserError, match="no such file"):
        FeatureNetwork(tmp_path / "missing.pt")


def test_the_sheet_shows_originals_reconstructions_and_differences() -> None:
    original, decoded = torch.full((3, 20, 30), 0.5), torch.full((3, 20, 30), 0.4)
    image = Reconstruction(name="a.png", original=original, decoded=decoded, psnr=26.0)
    clip = Reconstruction(
        name="b.mp4", original=original.repeat(5, 1, 1, 1), decoded=decoded.repeat(5, 1, 1, 1), psnr=26.0
    )
    sheet = draw_sheet([image, clip])
    height = 20 + LINE + MARGIN
    assert sheet.shape[0] == MARGIN + LINE + 3 * height, "a row for the image, two for the clip"
    width = (sheet.shape[1] - MARGIN) // 3
    for row in range(3):
        top = MARGIN + LINE + row * height
        values = [sheet[top + 10, MARGIN + column * width + 15].tolist() for column in range(3)]
        assert values[:2] == [[191] * 3, [178] * 3]
        assert values[2] == [round(0.1 * DIFFERENCE_GAIN * 127.5)] * 3
    with pytest.raises(ValueError, match="no reconstruction"):
        draw_sheet([])


def test_the_table_has_the_columns_of_the_paper(tokenizer: VisionTokenizer) -> None:
    scores, _ = evaluate(tokenizer, samples(1, 3, 12, 12))
    head, rule, row = table([scores]).splitlines()
    assert head.startswith("|  | resolution | samples | LPIPS | PSNR | SSIM | rFID |")
    assert head.count("|") == rule.count("|") == row.count("|")
    assert row.startswith("| images | 12x12 | 1 | - |")
