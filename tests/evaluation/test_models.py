"""CLIP and detectors from folders, with tiny random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from emu3_megatron.errors import UserError
from emu3_megatron.evaluation.models import GROUND, Clip, Detector, crop, objects_of_masks
from emu3_megatron.evaluation.objects import COLOURS, Found

MEAN, DEVIATION = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]


def preprocessor(folder: Path, **more: object) -> None:
    numbers = {"image_mean": MEAN, "image_std": DEVIATION, **more}
    (folder / "preprocessor_config.json").write_text(json.dumps(numbers))


def clip_folder(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    words = [*COLOURS, "a", "photo", "of", "cat", "dog", "object", "colored", "-"]
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<pad>", *words, "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<end>"
    ).save_pretrained(folder)
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**common, "vocab_size": len(vocabulary), "eos_token_id": len(vocabulary) - 1},
        vision_config={**common, "image_size": 8, "patch_size": 4},
        projection_dim=12,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    preprocessor(folder)
    return folder


def detector_folder(folder: Path) -> Path:
    from transformers import YolosConfig, YolosForObjectDetection

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=[64, 64],
        patch_size=16, num_detection_tokens=5, id2label={0: "cat", 1: "mouse"},
        label2id={"cat": 0, "mouse": 1},
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(folder)
    preprocessor(folder, size={"shortest_edge": 64, "longest_edge": 128})
    return folder


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_clip_is_the_model_of_its_folder(tmp_path: Path) -> None:
    """Of pictures that need no scaling: the cosines that transformers computes."""
    from transformers import AutoTokenizer, CLIPModel

    folder = clip_folder(tmp_path)
    pictures, texts = [picture(8, 8), picture(8, 8)[::-1].copy()], ["a photo of a cat", "red dog"]
    scores = Clip(folder).similarity(pictures, texts)
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    pixels = (np.stack(pictures) / 255 - MEAN) / DEVIATION
    words = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(
            pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2).float(),
            input_ids=words["input_ids"],
            attention_mask=words["attention_mask"],
        )
    expected = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).numpy()
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_pictures_of_any_size_have_a_score_and_a_colour(tmp_path: Path) -> None:
    clip = Clip(clip_folder(tmp_path))
    pictures = [picture(*size) for size in ((8, 30), (50, 9), (1, 1))]
    assert clip.similarity(pictures, ["a cat"] * 3).shape == (3,)
    assert set(clip.colours(pictures, "cat")) <= set(COLOURS)
    assert clip.colours([], "cat") == []


def test_a_detector_gives_boxes_in_pixels_of_the_picture(tmp_path: Path) -> None:
    found = Detector(detector_folder(tmp_path)).find(picture(60, 200))
    assert len(found) == 5
    assert {each.name for each in found} <= {"cat", "computer mouse"}
    boxes = np.array([each.box for each in found])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert ((centres > 0) & (centres < (200, 60))).all()


def test_a_detector_without_a_class_for_no_object_is_refused(tmp_path: Path) -> None:
    from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = ConditionalDetrConfig(
        use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, backbone_config=backbone,
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5, num_labels=2,
    )  # fmt: skip
    ConditionalDetrForObjectDetection(config).save_pretrained(tmp_path)
    preprocessor(tmp_path, size={"shortest_edge": 64, "longest_edge": 128})
    with pytest.raises(UserError, match=r"2 scores an object for 2 classes.*DETR and YOLOS"):
        Detector(tmp_path).find(picture(60, 200))


def test_masks_become_objects_with_boxes() -> None:
    """A sure cat in the upper left quarter; the second query has no pixels."""
    classes = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
    masks = torch.full((2, 4, 4), -20.0)
    masks[0, :2, :2] = 20.0
    found = objects_of_masks(classes, masks, {0: "cat", 1: "computer mouse"}, (4, 4))
    assert {each.name for each in found} == {"cat", "computer mouse"}
    best = max(found, key=lambda each: each.score)
    assert (best.name, best.box) == ("cat", (0.0, 0.0, 2.0, 2.0))
    assert best.score == pytest.approx(1.0, abs=1e-3)
    assert best.mask is not None
    assert best.mask.sum() == 4
    large = max(objects_of_masks(classes, masks, {0: "cat", 1: "x"}, (8, 16)), key=lambda each: each.score)
    assert large.mask is not None
    assert large.mask.shape == (8, 16)
    assert large.box == (0.0, 0.0, 8.0, 4.0)


def test_an_object_is_cut_out_on_gray() -> None:
    whole = picture(10, 12)
    mask = np.zeros((10, 12), dtype=bool)
    mask[2:5, 3:6] = True
    cut = crop(whole, Found("cat", (2, 1, 7, 6), 1.0, mask))
    assert cut.shape == (5, 5, 3)
    np.testing.assert_array_equal(cut[1:4, 1:4], whole[2:5, 3:6])
    assert (cut[0] == GROUND).all()
    assert crop(whole, Found("cat", (-5, -5, 30, 30), 1.0)).shape == whole.shape
    assert crop(whole, Found("cat", (40, 40, 40, 40), 1.0)).shape == (1, 1, 3)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="preprocessor_config"):
        Clip(tmp_path)
    preprocessor(tmp_path)
    for kind in (Clip, Detector):
        with pytest.raises(UserError, match=r"no CLIP model|no detector"):
            kind(tmp_path)
