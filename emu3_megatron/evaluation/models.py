"""Models that look at pictures, from a Hugging Face folder: CLIP, and detectors of objects.

Pictures are prepared here from the numbers in the folder's ``preprocessor_config.json``: the processors of
transformers need torchvision.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from emu3_megatron.errors import UserError
from emu3_megatron.evaluation.objects import CLASS_NAMES, COLOURS, Found

Pixels = npt.NDArray[np.uint8]

GROUND = 0x99
"""Gray level around an object whose colour is asked for, as in GenEval."""

COLOUR_TEXTS = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)
"""GenEval's texts for a colour."""

_SIDES = (800, 1333)
"""Shorter and longer side of a detector's picture, where its folder does not say."""

_MOST_QUERIES = 100
"""Surest pairs of a query and a class that become objects."""


class Clip:
    """A CLIP model: how well texts fit pictures.

    Raises `UserError` for a folder that holds none.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPModel

        numbers = _preprocessor(folder)
        try:
            self._model: Any = CLIPModel.from_pretrained(folder, local_files_only=True).to(device).eval()
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is no CLIP model with its tokenizer: {error}") from error
        self._device = device
        self._side = int(self._model.config.vision_config.image_size)
        self._mean, self._deviation = numbers["image_mean"], numbers["image_std"]

    @torch.no_grad()
    def similarity(self, pictures: Sequence[Pixels], texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Cosine of each picture (uint8 ``[H, W, 3]``) with its own text: ``[N]``; CLIP-T is their mean."""
        images_ND, texts_ND = self._embed(pictures, texts)
        cosines: npt.NDArray[np.float64] = (images_ND * texts_ND).sum(dim=1).double().cpu().numpy()
        return cosines

    @torch.no_grad()
    def colours(self, crops: Sequence[Pixels], name: str) -> list[str]:
        """Of `COLOURS`, the one that fits each picture of a `name` best."""
        if not crops:
            return []
        texts = [text.format(colour=colour, name=name) for colour in COLOURS for text in COLOUR_TEXTS]
        images_ND, texts_CD = self._embed(crops, texts)
        means_CD = texts_CD.view(len(COLOURS), len(COLOUR_TEXTS), -1).mean(dim=1)
        best_N = (images_ND @ F.normalize(means_CD, dim=1).T).argmax(dim=1)
        return [COLOURS[index] for index in best_N.tolist()]

    def _embed(self, pictures: Sequence[Pixels], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings of length 1."""
        pixels = torch.stack([self._prepare(picture) for picture in pictures]).to(self._device)
        words = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(
            self._device
        )
        out = self._model(
            pixel_values=pixels,
            input_ids=words["input_ids"].to(self._device),
            attention_mask=words["attention_mask"].to(self._device),
        )
        return out.image_embeds, out.text_embeds

    def _prepare(self, picture: Pixels) -> Tensor:
        """The middle square of a picture at the model's size, normalized ``[3, S, S]``."""
        height, width = picture.shape[:2]
        scale = self._side / min(height, width)
        size = (max(self._side, round(width * scale)), max(self._side, round(height * scale)))
        resized = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - self._side) // 2, (size[1] - self._side) // 2
        square = resized.crop((left, top, left + self._side, top + self._side))
        return _normalized(square, self._mean, self._deviation)


class Detector:
    """Finds objects: a model for object detection (boxes) or instance segmentation (masks too).

    GenEval's own is Mask2Former (``mask2former-swin-small-coco-instance``). Of models that give boxes
    alone, those work that have a class for no object, as DETR and YOLOS. Raises `UserError` for a folder that
    holds neither.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        from transformers import AutoConfig, AutoModelForObjectDetection, AutoModelForUniversalSegmentation

        self._folder, self._numbers = folder, _preprocessor(folder)
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            self._masks = any(
                name.endswith("ForUniversalSegmentation") for name in config.architectures or []
            )
            kind: Any = AutoModelForUniversalSegmentation if self._masks else AutoModelForObjectDetection
            self._model: Any = kind.from_pretrained(folder, local_files_only=True).to(device).eval()
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} holds no detector of objects: {error}") from error
        self._names = {
            number: CLASS_NAMES.get(name, name) for number, name in self._model.config.id2label.items()
        }
        self._device = device

    @torch.no_grad()
    def find(self, picture: Pixels) -> list[Found]:
        """The objects in a picture, uint8 ``[H, W, 3]``, in no order and with any score.

        Raises:
            UserError: the model has no class for no object.
        """
        height, width = picture.shape[:2]
        size = self._numbers.get("size", {})
        short, long = size.get("shortest_edge", _SIDES[0]), size.get("longest_edge", _SIDES[1])
        scale = min(short / min(height, width), long / max(height, width))
        # stages of a backbone halve the picture five times
        sides = [max(32, round(side * scale / 32) * 32) for side in (width, height)]
        resized = Image.fromarray(picture).resize((sides[0], sides[1]), Image.Resampling.BILINEAR)
        pixels = _normalized(resized, self._numbers["image_mean"], self._numbers["image_std"])
        out = self._model(pixel_values=pixels[None].to(self._device))
        if self._masks:
            return objects_of_masks(
                out.class_queries_logits[0], out.masks_queries_logits[0], self._names, (height, width)
            )
        if out.logits.shape[-1] != self._model.config.num_labels + 1:
            raise UserError(
                f"{self._folder} gives {out.logits.shape[-1]} scores an object for "
                f"{self._model.config.num_labels} classes, and none for no object; give a detector that has "
                "one, as DETR and YOLOS, or Mask2Former"
            )
        scores_QC = out.logits[0].softmax(dim=-1)[:, :-1].double().cpu()
        centre_x, centre_y, across, down = out.pred_boxes[0].double().cpu().unbind(dim=-1)
        left, right = (centre_x - across / 2) * width, (centre_x + across / 2) * width
        top, bottom = (centre_y - down / 2) * height, (centre_y + down / 2) * height
        boxes_Q4 = torch.stack([left, top, right, bottom], dim=-1).tolist()
        best = zip(*(each.tolist() for each in scores_QC.max(dim=-1)), boxes_Q4, strict=True)
        return [Found(self._names[number], tuple(box), score) for score, number, box in best]


def objects_of_masks(
    class_logits_QC: Tensor, mask_logits_QHW: Tensor, names: Mapping[int, str], size: tuple[int, int]
) -> list[Found]:
    """Objects of Mask2Former: a query's sureness of its class times that of its pixels.

    Args:
        class_logits_QC: of every query, the last class being none.
        mask_logits_QHW: of every query, of any size; positive inside the object.
        names: of the classes.
        size: height and width of the picture.
    """
    scores_QC = class_logits_QC.softmax(dim=-1)[:, :-1]
    classes = scores_QC.shape[1]
    surest = scores_QC.flatten().topk(min(_MOST_QUERIES, scores_QC.numel()))
    masks_QHW = F.interpolate(mask_logits_QHW[None], size=size, mode="bilinear", align_corners=False)[0]
    found = []
    for score, index in zip(surest.values.tolist(), surest.indices.tolist(), strict=True):
        logits_HW = masks_QHW[index // classes]
        mask = logits_HW > 0
        if not bool(mask.any()):
            continue
        rows, columns = mask.nonzero(as_tuple=True)
        box = (float(columns.min()), float(rows.min()), float(columns.max()) + 1, float(rows.max()) + 1)
        sure = score * float(logits_HW[mask].sigmoid().mean())
        found.append(Found(names[index % classes], box, sure, mask.cpu().numpy()))
    return found


def crop(picture: Pixels, found: Found) -> Pixels:
    """An object alone: its box, gray outside its mask."""
    if found.mask is not None:
        picture = np.where(found.mask[..., None], picture, np.uint8(GROUND))
    left, top, right, bottom = (round(side) for side in found.box)
    left, top = min(max(left, 0), picture.shape[1] - 1), min(max(top, 0), picture.shape[0] - 1)
    return np.ascontiguousarray(picture[top : max(bottom, top + 1), left : max(right, left + 1)])


def _preprocessor(folder: Path) -> dict[str, Any]:
    """``preprocessor_config.json``, with mean and deviation of ImageNet where it states none."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise UserError(f"{path} is missing; give a Hugging Face folder with its preprocessor")
    numbers: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], **numbers}


def _normalized(picture: Image.Image, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """``[3, H, W]``."""
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
