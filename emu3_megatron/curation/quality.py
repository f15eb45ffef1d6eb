"""Quality: a scorer behind a small protocol, the stage that applies it, and what is re-admitted."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from emu3_megatron.curation.config import QualityConfig, ReadmissionConfig
from emu3_megatron.curation.frames import Picture, pictures_of
from emu3_megatron.curation.models import OnnxModel, clip_pixels, fingerprint, to_device
from emu3_megatron.curation.no_reference import colourfulness, combine, no_reference_parts
from emu3_megatron.curation.ocr import detector_name, picture_coverage
from emu3_megatron.curation.units import KEEP, Decision, Score, Stage, Unit, drop
from emu3_megatron.errors import UserError, one_line

CLIP_FRAMES = 3
"""Frames of a clip that are scored; the least counts (paper)."""

BELOW_QUALITY = "below quality"
"""Mark, and reason, of what the quality stage would drop."""

PAPER_THRESHOLDS: Mapping[str, float] = {"image": 5.5, "video": 5.0}
"""On the scale of the LAION aesthetic predictor (paper, section 2.1)."""


class QualityScorer(Protocol):
    """Judges pictures. Implement this and pass it to `QualityStage` for a score of your own."""

    name: str
    """Goes into the fingerprint of scores: include versions and checksums of weights."""
    thresholds: Mapping[str, float]
    """Default thresholds on this scale for ``image`` and ``video``."""

    def __call__(self, pictures: Sequence[Picture]) -> list[float]:
        """Scores of RGB pictures, uint8 ``[H, W, 3]`` of any sizes; higher is better."""
        ...


class NoReferenceScorer:
    """PIQE, sharpness and colourfulness, 0 to 10; needs no weights."""

    name = "no reference 1: piqe, laplacian, colourfulness"
    thresholds: Mapping[str, float] = {"image": 4.0, "video": 4.0}

    def __call__(self, pictures: Sequence[Picture]) -> list[float]:
        """See `QualityScorer`."""
        return [combine(no_reference_parts(picture)) for picture in pictures]


class AestheticScorer:
    """The LAION aesthetic predictor: a head on the normalised image features of a CLIP model.

    Takes a CLIP folder (Hugging Face) or an ONNX file that gives features ``[N, D]``, and the head's weights
    (``.pth``, ``.pt``, ``.safetensors``): the linear head of github.com/LAION-AI/aesthetic-predictor or the
    stack of linear layers of github.com/christophschuhmann/improved-aesthetic-predictor, told apart by their
    shapes. An ONNX file that gives the score ``[N, 1]`` itself takes no head.
    """

    thresholds = PAPER_THRESHOLDS

    def __init__(self, model: Path, head: Path | None, device: str = "cpu") -> None:
        """Load the weights. Raises `UserError` where they are missing or do not fit each other."""
        for path in (model, head):
            if path is not None and not path.exists():
                raise UserError(f"{path}: no such file or folder; it should hold the quality model's weights")
        self.name = f"aesthetic {fingerprint(model)} {fingerprint(head) if head else ''}"
        self._features: Any = OnnxModel(model, device) if model.is_file() else _clip_features(model, device)
        self._size = self._features.image_size
        self._head = None if head is None else read_head(head)
        if head is None and model.is_dir():
            raise UserError(
                f"quality.model={model} gives features; quality.head must name the head's weights"
            )

    def __call__(self, pictures: Sequence[Picture]) -> list[float]:
        """See `QualityScorer`."""
        values = np.asarray(self._features(clip_pixels(list(pictures), self._size))[0], np.float64)
        if self._head is not None:
            values = values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)
            for weight, bias in self._head:
                if values.shape[-1] != weight.shape[1]:
                    raise UserError(
                        f"quality.head takes {weight.shape[1]} features and the model gives "
                        f"{values.shape[-1]}; use the head made for this CLIP"
                    )
                values = values @ weight.T + bias
        if values.shape != (len(pictures), 1):
            raise UserError(
                f"the quality model gives {list(values.shape[1:])} values a picture; one was "
                "expected. Where these are features, name the head's weights in quality.head"
            )
        return [float(value) for value in values[:, 0]]


class _ClipFeatures:
    """Image features of a Hugging Face CLIP folder."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import CLIPVisionModelWithProjection

        self._device = device
        model = CLIPVisionModelWithProjection.from_pretrained(folder, local_files_only=True)
        self._model = to_device(model, device)
        self.image_size = int(self._model.config.image_size)

    def __call__(self, pixels: Any) -> list[Any]:
        """Features, ``[N, D]``."""
        import torch

        with torch.no_grad():
            return [self._model(torch.from_numpy(pixels).to(self._device)).image_embeds.float().cpu().numpy()]


def _clip_features(folder: Path, device: str) -> _ClipFeatures:
    """Open a CLIP folder, in the user's terms where it is none."""
    try:
        return _ClipFeatures(folder, device)
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder}: not a CLIP folder of Hugging Face: {str(error).splitlines()[0]}"
        ) from error


def read_head(path: Path) -> list[tuple[Any, Any]]:
    """Weights ``[out, in]`` and biases of a head's linear layers, in order.

    Raises:
        UserError: the file holds no stack of linear layers that ends in one value.
    """
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        layers = []
        for name in sorted((n for n in state if n.endswith("weight")), key=_layer_number):
            weight, bias = state[name].double().numpy(), state[name.removesuffix("weight") + "bias"]
            layers.append((weight, bias.double().numpy()))
        fits = all(a.shape[0] == b.shape[1] for (a, _), (b, _) in itertools.pairwise(layers))
        if layers and fits and layers[-1][0].shape[0] == 1:
            return layers
    except Exception as error:  # torch, pickle and safetensors raise many types
        reason = one_line(error).split(". ")[0]
        raise UserError(f"{path}: cannot be read as the weights of a head: {reason}") from error
    raise UserError(f"{path}: holds no stack of linear layers that ends in one value")


def _layer_number(name: str) -> tuple[int, ...]:
    """Numbers in a weight's name, for the order of layers."""
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def make_scorer(config: QualityConfig) -> QualityScorer:
    """The aesthetic model of the configuration, or the no-reference score."""
    if config.model is None:
        if config.head is not None:
            raise UserError("quality.head needs quality.model, whose features it takes")
        return NoReferenceScorer()
    return AestheticScorer(config.model, config.head, config.device)


class QualityStage(Stage):
    """Compares the score of an image, or the least of a clip's three frames, with the threshold."""

    name = "quality"

    def __init__(
        self, config: QualityConfig, scorer: QualityScorer, *, readmit_from: float | None = None
    ) -> None:
        """Below the threshold, but not below `readmit_from`, a later stage has the last word."""
        self._threshold, self._scorer, self._readmit_from = config.threshold, scorer, readmit_from

    def settings(self) -> Mapping[str, Any]:
        """The scorer."""
        return {"scorer": self._scorer.name, "frames": CLIP_FRAMES}

    def score(self, unit: Unit) -> Score:
        """The score that counts, and those of all frames."""
        values = [round(value, 4) for value in self._scorer(pictures_of(unit, CLIP_FRAMES))]
        return {"quality": min(values), **({"frames": values} if len(values) > 1 else {})}

    def decide(self, unit: Unit, score: Score) -> Decision:
        """Compare with the threshold."""
        threshold = self._scorer.thresholds[unit.kind] if self._threshold is None else self._threshold
        if score["quality"] >= threshold:
            return KEEP
        if self._readmit_from is not None and score["quality"] >= self._readmit_from:
            return Decision(flags=frozenset([BELOW_QUALITY]))
        return drop(BELOW_QUALITY, f"{score['quality']:.2f}, less than {threshold:g}")


class ReadmissionStage(Stage):
    """Of images below the quality threshold, keeps those with colour and little text (paper, section 2.1)."""

    name = "readmission"

    def __init__(self, config: ReadmissionConfig) -> None:
        """`config` has the limits."""
        self._config = config

    def settings(self) -> Mapping[str, Any]:
        """The text detector."""
        return {"shorter_edge": self._config.shorter_edge, "detector": detector_name()}

    def applies(self, flags: frozenset[str]) -> bool:
        """Only marked images."""
        return BELOW_QUALITY in flags

    def score(self, unit: Unit) -> Score:
        """Text coverage and colourfulness."""
        (picture,) = pictures_of(unit, 1)
        return {
            "coverage": picture_coverage(picture, self._config.shorter_edge),
            "colourfulness": round(colourfulness(picture), 2),
        }

    def decide(self, unit: Unit, score: Score) -> Decision:
        """Compare with the limits."""
        config = self._config
        if score["colourfulness"] < config.min_colourfulness:
            return drop("below quality, no colour", f"colourfulness {score['colourfulness']:.1f}")
        if score["coverage"] > config.max_coverage:
            return drop("below quality, text", f"text on {score['coverage']:.1%}")
        return KEEP
