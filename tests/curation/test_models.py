"""Quality and type by weights on this machine: tiny models, made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from emu3_megatron.curation.config import QualityConfig, TypeConfig
from emu3_megatron.curation.image_type import TypeStage
from emu3_megatron.curation.models import clip_pixels
from emu3_megatron.curation.quality import PAPER_THRESHOLDS, make_scorer, read_head
from emu3_megatron.curation.units import Unit
from emu3_megatron.errors import UserError
from tests.curation.corpus import photograph, save
from tests.curation.onnx_files import write_features

PICTURES = [photograph(name) for name in ("astronaut.png", "coffee.png", "rocket.jpg")]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP folder with random weights and 12 features."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=12)
    folder = tmp_path_factory.mktemp("clip")
    CLIPVisionModelWithProjection(config).eval().save_pretrained(folder)
    return folder


def linear_head(path: Path, features: int) -> Path:
    """The linear head of the first aesthetic predictor."""
    torch.manual_seed(1)
    torch.save(torch.nn.Linear(features, 1).state_dict(), path)
    return path


def stacked_head(path: Path, features: int) -> torch.nn.Sequential:
    """The stack of the improved one, with its names."""
    torch.manual_seed(2)
    layers = torch.nn.Sequential(
        torch.nn.Linear(features, 9), torch.nn.Dropout(0.2), torch.nn.Linear(9, 5), torch.nn.Linear(5, 1)
    ).eval()
    torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, path)
    return layers


def test_the_aesthetic_score_is_the_head_on_normalised_features(clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPVisionModelWithProjection

    head = stacked_head(tmp_path / "head.pth", 12)
    scorer = make_scorer(QualityConfig(model=clip, head=tmp_path / "head.pth"))
    with torch.no_grad():
        pixels = torch.from_numpy(clip_pixels(PICTURES, 32))
        features = CLIPVisionModelWithProjection.from_pretrained(clip)(pixels).image_embeds
        expected = head(features / features.norm(dim=-1, keepdim=True))[:, 0].tolist()
    assert scorer(PICTURES) == pytest.approx(expected, abs=1e-5)
    assert scorer(PICTURES[::-1]) == pytest.approx(expected[::-1], abs=1e-5)
    assert scorer.thresholds == PAPER_THRESHOLDS
    linear = make_scorer(QualityConfig(model=clip, head=linear_head(tmp_path / "linear.pth", 12)))
    assert linear.name != scorer.name
    assert linear(PICTURES) != scorer(PICTURES)


def test_an_onnx_file_gives_features_or_the_score(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((3, 12)).astype(np.float32)
    model = write_features(tmp_path / "features.onnx", weight)
    linear_head(tmp_path / "head.pth", 12)
    features = clip_pixels(PICTURES, 32).mean((2, 3)) @ weight
    ((head, bias),) = read_head(tmp_path / "head.pth")
    expected = features / np.linalg.norm(features, axis=-1, keepdims=True) @ head.T + bias
    scorer = make_scorer(QualityConfig(model=model, head=tmp_path / "head.pth"))
    assert scorer(PICTURES) == pytest.approx(expected[:, 0].tolist(), abs=1e-5)
    score = write_features(tmp_path / "score.onnx", weight[:, :1])
    assert make_scorer(QualityConfig(model=score))(PICTURES) == pytest.approx(
        features[:, 0].tolist(), abs=1e-5
    )
    with pytest.raises(UserError, match="name the head's weights"):
        make_scorer(QualityConfig(model=model))(PICTURES)


def test_clip_pixels_are_those_of_transformers() -> None:
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    for picture in PICTURES:
        expected = processor(images=picture, return_tensors="np")["pixel_values"]
        assert np.abs(clip_pixels([picture], 64) - expected).mean() < 0.02


def test_weights_that_do_not_fit_have_one_clear_line(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "garbage.pth").write_bytes(b"garbage")
    torch.save({"a.weight": torch.zeros(3, 4), "a.bias": torch.zeros(3)}, tmp_path / "three.pth")
    (tmp_path / "folder").mkdir()
    linear_head(tmp_path / "wide.pth", 20)
    for config, message in (
        (QualityConfig(model=clip), "quality.head must name"),
        (QualityConfig(model=clip, head=tmp_path / "garbage.pth"), "cannot be read as the weights"),
        (QualityConfig(model=clip, head=tmp_path / "three.pth"), "no stack of linear layers"),
        (QualityConfig(model=tmp_path / "folder", head=tmp_path / "three.pth"), "not a CLIP folder"),
        (QualityConfig(model=clip, head=tmp_path / "wide.pth"), "takes 20 features and the model gives 12"),
    ):
        with pytest.raises(UserError, match=message):
            make_scorer(config)(PICTURES)


def test_a_classifier_names_the_types(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    labels = ("painting", "photo", "map")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**sizes, image_size=32, patch_size=16, id2label=dict(enumerate(labels)), num_labels=3)
    model = ViTForImageClassification(config)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
    model.save_pretrained(tmp_path / "classifier")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "classifier")
    stage = TypeStage(TypeConfig(model=tmp_path / "classifier", drop=("photo",)))
    path = save(tmp_path / "a.png", PICTURES[0])
    unit = Unit(id="a", kind="image", record={"image": "a.png"}, path=path)
    score = stage.score(unit)
    assert score["type"] == "photo"
    assert stage.decide(unit, score).reason == "is a photo"
    with pytest.raises(UserError, match="painting, photo, map"):
        TypeStage(TypeConfig(model=tmp_path / "classifier", drop=("chart",)))
    with pytest.raises(UserError, match="no such folder"):
        TypeStage(TypeConfig(model=tmp_path / "none", drop=()))
