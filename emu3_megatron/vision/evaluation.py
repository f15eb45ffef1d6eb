"""How well a vision tokenizer reconstructs pictures it has not seen: figures, a table, a sheet of pictures.

Shapes: N images, B batch, T frames, F features, C channels, H W height and width. Pixels are in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from emu3_megatron.errors import UserError, one_line
from emu3_megatron.vision.metrics import codebook_use, psnr, ssim
from emu3_megatron.vision.model import VisionTokenizer


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A picture to reconstruct."""

    name: str
    """For the sheet."""
    pixels: Tensor
    """float32 in [-1, 1]; an image [3, H, W] or a clip [T, 3, H, W]."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Means over the samples of one kind and size; clips count as one sample each."""

    kind: str
    """``images`` or ``clips``."""
    size: str
    """Height and width in pixels, such as 256x256."""
    samples: int
    """How many."""
    psnr: float
    """Mean over samples of the peak signal-to-noise ratio of a sample, in dB."""
    ssim: float
    """Mean over samples of the structural similarity."""
    lpips: float | None
    """Mean over frames of the perceptual distance; None where it was not asked for."""
    rfid: float | None
    """Fréchet distance of the frames' features; None without a feature network."""
    codes_used: int
    """Different codes."""
    codebook_usage: float
    """The same over the codebook's size."""
    perplexity: float
    """2 to the entropy of the codes."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """A sample, for the sheet."""

    name: str
    """That of the sample."""
    original: Tensor
    """[3, H, W] or [T, 3, H, W]."""
    decoded: Tensor
    """The same shape, clipped to [-1, 1]."""
    psnr: float
    """In dB."""


class Distance(Protocol):
    """A distance of pictures, such as `perceptual.PerceptualDistance`."""

    def __call__(self, x_NCHW: Tensor, y_NCHW: Tensor) -> Tensor:
        """One distance for each picture."""


class Evaluation:
    """Collects the scores of samples of one kind and size.

    Args:
        tokenizer: in evaluation mode.
        perceptual: LPIPS, where it is wanted.
        features: what gives [N, F] of uint8 [N, 3, H, W], where the Fréchet distance is wanted.
        keep: how many reconstructions to keep for the sheet.
    """

    def __init__(
        self,
        tokenizer: VisionTokenizer,
        *,
        perceptual: Distance | None = None,
        features: FeatureNetwork | None = None,
        keep: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.perceptual = perceptual
        self.features = features
        self.keep = keep
        self.kept: list[Reconstruction] = []
        """The first reconstructions."""
        self._shape: torch.Size | None = None
        self._figures: list[tuple[float, float]] = []
        self._distances: list[Tensor] = []
        self._codes: list[Tensor] = []
        self._statistics = (FeatureStatistics(), FeatureStatistics())

    @torch.no_grad()
    def add(self, samples: Sequence[Sample]) -> None:
        """Reconstruct a batch of samples, all of the shape of the first batch's.

        Raises:
            ValueError: samples of different shapes, or what `VisionTokenizer.encode` refuses.
        """
        shapes = {sample.pixels.shape for sample in samples} | ({self._shape} if self._shape else set())
        if len(shapes) != 1:
            raise ValueError(
                f"samples have shapes {sorted(list(shape) for shape in shapes if shape)}: one evaluation "
                "takes one shape; make another for each"
            )
        self._shape = samples[0].pixels.shape
        pixels = torch.stack([sample.pixels for sample in samples]).to(self.tokenizer.device)
        codes = self.tokenizer.encode(pixels)
        decoded = self.tokenizer.decode(codes).clamp_(-1, 1)
        self._codes.append(codes.cpu())
        for sample, x, y in zip(samples, pixels, decoded, strict=True):
            frames_x, frames_y = (t.reshape(-1, *t.shape[-3:]) for t in (x, y))
            figures = psnr(frames_y, frames_x), ssim(frames_y, frames_x)
            self._figures.append(figures)
            if len(self.kept) < self.keep:
                kept = Reconstruction(name=sample.name, original=x.cpu(), decoded=y.cpu(), psnr=figures[0])
                self.kept.append(kept)
            if self.perceptual is not None:
                self._distances.append(self.perceptual(frames_y, frames_x).float().cpu())
            if self.features is not None:
                for statistics, frames in zip(self._statistics, (frames_x, frames_y), strict=True):
                    statistics.add(self.features(to_bytes(frames)))

    def scores(self) -> Scores:
        """Means over everything added so far.

        Raises:
            ValueError: nothing was added.
        """
        if self._shape is None:
            raise ValueError("no sample was added: there is nothing to score; add some")
        use = codebook_use(
            torch.cat([codes.flatten() for codes in self._codes]), self.tokenizer.config.codebook_size
        )
        figures = torch.tensor(self._figures, dtype=torch.float64).mean(0)
        return Scores(
            kind="images" if len(self._shape) == 3 else "clips",
            size=f"{self._shape[-2]}x{self._shape[-1]}",
            samples=len(self._figures),
            psnr=float(figures[0]),
            ssim=float(figures[1]),
            lpips=float(torch.cat(self._distances).double().mean()) if self._distances else None,
            rfid=frechet_distance(*self._statistics) if self.features is not None else None,
            codes_used=use.used,
            codebook_usage=use.fraction,
            perplexity=use.perplexity,
        )


def evaluate(
    tokenizer: VisionTokenizer,
    samples: Iterable[Sample],
    *,
    perceptual: Distance | None = None,
    features: FeatureNetwork | None = None,
    keep: int = 0,
    batch_pixels: int = 1 << 20,
) -> tuple[Scores, list[Reconstruction]]:
    """Scores of samples of one shape, and the first `keep` reconstructions.

    Args:
        tokenizer: in evaluation mode.
        samples: of one shape.
        perceptual: LPIPS, where it is wanted.
        features: the feature network of rFID, where it is wanted.
        keep: reconstructions to give back.
        batch_pixels: pixels times frames of a batch.
    """
    evaluation = Evaluation(tokenizer, perceptual=perceptual, features=features, keep=keep)
    batch: list[Sample] = []
    for sample in samples:
        batch.append(sample)
        if (len(batch) + 1) * sample.pixels.numel() > batch_pixels * 3:
            evaluation.add(batch)
            batch = []
    if batch:
        evaluation.add(batch)
    return evaluation.scores(), evaluation.kept


def to_bytes(pixels: Tensor) -> Tensor:
    """uint8 of pixels in [-1, 1], rounded and clipped; any shape."""
    return (pixels.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


class FeatureNetwork:
    """A TorchScript file that turns uint8 pictures [N, 3, H, W] into features [N, F].

    This is the form in which the Inception network of FID is passed around (``inception-2015-12-05.pt``); if
    `forward` has an argument ``return_features``, it is set. Anything that resizes belongs into the file.

    Args:
        path: the file.
        device: where it runs.

    Raises:
        UserError: the file is missing or no TorchScript.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"features is {path}: no such file; give a TorchScript file, or leave rFID out")
        try:
            self._module: Any = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"features {path}: not a TorchScript file ({one_line(error)[:80]}); write one with "
                "torch.jit.save"
            ) from error
        names = {argument.name for argument in self._module.forward.schema.arguments}
        self._options = {"return_features": True} if "return_features" in names else {}

    @torch.no_grad()
    def __call__(self, pictures_NCHW: Tensor) -> Tensor:
        """Features [N, F] of uint8 pictures; `UserError` where the network gives another shape."""
        features = self._module(pictures_NCHW, **self._options)
        if not isinstance(features, Tensor) or features.shape[:-1] != pictures_NCHW.shape[:1]:
            shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(
                f"features {self.path}: gave {shape} for {len(pictures_NCHW)} pictures: it must give one row "
                "of features for each; flatten or pool them in the file"
            )
        return features


class FeatureStatistics:
    """Sums of features and of their products, in float64: enough for mean and covariance."""

    def __init__(self) -> None:
        self.count = 0
        self._sum_F = torch.zeros(())
        self._products_FF = torch.zeros(())

    def add(self, features_NF: Tensor) -> None:
        """Take more rows."""
        rows_NF = features_NF.double().cpu()
        self.count += len(rows_NF)
        self._sum_F = self._sum_F + rows_NF.sum(0)
        self._products_FF = self._products_FF + rows_NF.T @ rows_NF

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [F] and covariance [F, F], with n - 1 in the denominator.

        Raises:
            ValueError: fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} frames have features: rFID needs at least 2; give more pictures")
        mean_F = self._sum_F / self.count
        covariance_FF = (self._products_FF - self.count * torch.outer(mean_F, mean_F)) / (self.count - 1)
        return mean_F, covariance_FF


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Fréchet distance of two Gaussians with these moments (Heusel et al. 2017).

    With fewer rows than features it depends strongly on their number: compare equal numbers only.
    """
    (mean_a, covariance_a), (mean_b, covariance_b) = a.moments(), b.moments()
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(0.0, float(distance))


def table(rows: Sequence[Scores]) -> str:
    """The scores in Markdown: the columns of Emu3's paper (its table 2), then those of the codebook."""
    heads = (
        "", "resolution", "samples", "LPIPS", "PSNR", "SSIM", "rFID", "codes used", "usage", "perplexity",
    )  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = (
            row.kind, row.size, str(row.samples), _cell(row.lpips, 3), _cell(row.psnr, 2), _cell(row.ssim, 3),
            _cell(row.rfid, 2), str(row.codes_used), f"{row.codebook_usage:.1%}", f"{row.perplexity:.1f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def as_json(rows: Sequence[Scores]) -> list[dict[str, object]]:
    """The scores as JSON values."""
    return [asdict(row) for row in rows]
