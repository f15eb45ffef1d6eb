"""What kind of picture an image is: photograph, drawing, chart, text page or screenshot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from emu3_megatron.curation.config import TypeConfig
from emu3_megatron.curation.frames import Picture, pictures_of, resize
from emu3_megatron.curation.models import fingerprint, to_device
from emu3_megatron.curation.ocr import detector_name, text_coverage
from emu3_megatron.curation.units import KEEP, Decision, Score, Stage, Unit, drop
from emu3_megatron.errors import UserError

TYPES = ("photograph", "drawing", "chart", "text_page", "screenshot")
"""The kinds that the heuristics tell apart."""

SEEN_EDGE = 448
"""Shorter edge at which pictures are looked at."""


class TypeClassifier(Protocol):
    """Names the kind of a picture."""

    @property
    def name(self) -> str:
        """Goes into the fingerprint of scores."""
        ...

    @property
    def labels(self) -> Sequence[str]:
        """All kinds it knows."""
        ...

    def __call__(self, picture: Picture) -> Score:
        """A score with the key ``type``, and what led to it."""
        ...


class HeuristicClassifier:
    """Rules over text coverage, flat areas and the palette. Errs on the side of photograph."""

    name = f"heuristics 1, {detector_name()}"
    labels = TYPES

    def __call__(self, picture: Picture) -> Score:
        """See `TypeClassifier`."""
        features = type_features(picture)
        return {"type": heuristic_type(features), **features}


def type_features(picture: Picture) -> dict[str, float]:
    """What the heuristics look at, each a share of the picture.

    Returns:
        ``text``: inside text boxes; ``flat``: pixels equal (within 1 level) to their right and lower
        neighbours; ``background``: pixels of the commonest colour (of 4,096); ``palette``: colours that it
        takes for 90% of the pixels, over 256; ``level``: brightness of the commonest colour;
        ``lines``: long straight horizontal or vertical edges, as a share of the perimeter.
    """
    small = resize(picture, shorter_edge=SEEN_EDGE)
    values = small.astype(np.int16)
    across = np.abs(np.diff(values, axis=1)).max(-1)[:-1] <= 1
    down = np.abs(np.diff(values, axis=0)).max(-1)[:, :-1] <= 1
    codes = (values >> 4) @ np.array([256, 16, 1])
    counts = np.bincount(codes.ravel(), minlength=4096)
    order = np.argsort(counts, kind="stable")[::-1]
    shares = counts[order] / codes.size
    colours = int(np.searchsorted(np.cumsum(shares), 0.9)) + 1
    commonest = np.array([order[0] >> 8, order[0] >> 4 & 15, order[0] & 15]) * 16 + 8
    return {
        "text": round(text_coverage(small), 4),
        "flat": round(float((across & down).mean()), 4),
        "background": round(float(shares[0]), 4),
        "palette": round(colours / 256, 4),
        "level": round(float(commonest.mean()) / 255, 4),
        "lines": round(_long_lines(small), 4),
    }


def _long_lines(picture: Picture) -> float:
    """Length of straight, level or upright edges of a quarter of the side or more, over the perimeter."""
    edges = cv2.Canny(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), 30, 90)
    total = 0
    for side, shape in ((picture.shape[1], (1, -1)), (picture.shape[0], (-1, 1))):
        length = max(8, side // 4)
        kernel = np.ones((1, length) if shape == (1, -1) else (length, 1), np.uint8)
        total += int(cv2.morphologyEx(edges, cv2.MORPH_OPEN, kernel).astype(bool).sum())
    return total / (2 * sum(picture.shape[:2]))


def heuristic_type(features: Mapping[str, float]) -> str:
    """One of `TYPES`, from `type_features`."""
    text, flat = features["text"], features["flat"]
    if flat < 0.35 and features["background"] < 0.35:
        return "text_page" if text > 0.3 else "photograph"
    plain = features["background"] > 0.35
    if text > 0.12 and plain and features["palette"] < 0.15 and features["lines"] < 0.5:
        return "text_page"
    if flat < 0.6:
        return "photograph"
    if 0.002 < text < 0.12 and features["background"] > 0.6 and features["lines"] >= 0.1:
        return "chart"
    if text > 0.015 and features["lines"] >= 1.0:
        return "screenshot"
    if text > 0.08:
        return "text_page"
    return "drawing"


class ModelClassifier:
    """An image classifier as a Hugging Face folder; its labels are the types."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Load it. Raises `UserError` where it cannot be."""
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder; type.model is a Hugging Face folder of an image classifier"
            )
        try:
            self._processor = AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, use_fast=False
            )
            model = AutoModelForImageClassification.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder}: not an image classifier: {str(error).splitlines()[0]}") from error
        self._model, self._device = to_device(model, device), device
        self.labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
        self.name = f"classifier {fingerprint(folder)}"

    def __call__(self, picture: Picture) -> Score:
        """See `TypeClassifier`."""
        import torch
        from PIL import Image

        inputs = self._processor(images=Image.fromarray(np.asarray(picture)), return_tensors="pt").to(
            self._device
        )
        with torch.no_grad():
            chances = torch.softmax(self._model(**inputs).logits[0].float(), -1)
        best = int(chances.argmax())
        return {"type": self.labels[best], "probability": round(float(chances[best]), 4)}


class TypeStage(Stage):
    """Drops images of unwanted kinds."""

    name = "type"

    def __init__(self, config: TypeConfig) -> None:
        """`config` has the classifier's weights and the kinds to drop."""
        self._classifier: TypeClassifier = (
            HeuristicClassifier() if config.model is None else ModelClassifier(config.model, config.device)
        )
        unknown = sorted(set(config.drop) - set(self._classifier.labels))
        if unknown:
            raise UserError(f"type.drop={unknown}: the classifier knows {', '.join(self._classifier.labels)}")
        self._drop = frozenset(config.drop)

    def settings(self) -> Mapping[str, Any]:
        """The classifier."""
        return {"classifier": self._classifier.name}

    def score(self, unit: Unit) -> Score:
        """The kind, and what led to it."""
        (picture,) = pictures_of(unit, 1)
        return self._classifier(picture)

    def decide(self, unit: Unit, score: Score) -> Decision:
        """Drop the unwanted."""
        return drop(f"is a {score['type'].replace('_', ' ')}") if score["type"] in self._drop else KEEP
