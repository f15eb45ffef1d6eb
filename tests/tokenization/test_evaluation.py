"""The evaluation tool, on scikit-image's photographs and a clip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from emu3_megatron.errors import UserError
from emu3_megatron.media import MediaError, list_media, write_mp4, write_png
from emu3_megatron.tokenization.evaluation import EvaluationConfig, evaluate_folder
from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig

ROOT = Path(__file__).parents[2]
MODEL = VisionTokenizerConfig(
    channels=32, channel_multiplier=(1, 1, 1), num_res_blocks=0, attention_resolutions=(), codebook_size=64
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photographs, a clip and a tokenizer."""
    root = tmp_path_factory.mktemp("evaluation")
    for name in ("astronaut", "chelsea", "coffee"):
        write_png(root / "media" / "photographs" / f"{name}.png", getattr(data, name)())
    picture = data.astronaut()
    moving = np.stack([picture[:128, 4 * i : 4 * i + 128] for i in range(12)])
    write_mp4(root / "media" / "moving.mp4", moving, 24)
    (root / "media" / "notes.txt").write_text("not media")
    torch.manual_seed(0)
    VisionTokenizer(MODEL).save_pretrained(root / "tokenizer")
    return root


def config(folder: Path, **changes: object) -> EvaluationConfig:
    values = {
        "tokenizer": str(folder / "tokenizer"),
        "data": str(folder / "media"),
        "output": str(folder / "output"),
        "sizes": [32, 48],
        "frames": 4,
        "lpips": "none",
    }
    return EvaluationConfig(**(values | changes))


def test_the_tool_prints_the_table_and_writes_it_with_scores_and_sheets(folder: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "evaluate_vision_tokenizer.py")]
    values = vars(config(folder))
    for key in ("tokenizer", "data", "output", "sizes", "frames", "lpips"):
        command += [f"--{key}", str(values[key])]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    output = folder / "output"
    text = (output / "table.md").read_text()
    assert done.stdout.startswith(text)
    rows = json.loads((output / "scores.json").read_text())
    assert [(row["kind"], row["size"], row["samples"]) for row in rows] == [
        ("images", "32x32", 3), ("clips", "32x32", 1), ("images", "48x48", 3), ("clips", "48x48", 1),
    ]  # fmt: skip
    for row in rows:
        assert 0 < row["psnr"] < 30
        assert 1 <= row["codes_used"] <= 64
        with Image.open(output / f"{row['kind']}-{row['size'].split('x')[0]}.png") as sheet:
            assert sheet.width > 3 * 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": [30]}, "sizes has 30: each must be a multiple of 4"),
        ({"sizes": [8]}, "at least 11 for the metrics"),
        ({"sizes": []}, "sizes is empty"),
        ({"frames": 6}, "frames is 6: it must be a multiple of 4"),
        ({"limit": 0}, "limit is 0"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"lpips": "alex", "lpips_weights": "missing.pth"}, "lpips_weights is missing.pth: no such file"),
        ({"features": "missing.pt"}, "features is missing.pt: no such file"),
        ({"data": "missing"}, "missing is not a folder"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate_folder(config(folder, **changes))


def test_media_are_found_below_a_folder_and_bad_ones_named(folder: Path, tmp_path: Path) -> None:
    found = list_media(folder / "media")
    assert [path.name for path in found.images] == ["astronaut.png", "chelsea.png", "coffee.png"]
    assert [path.name for path in found.videos] == ["moving.mp4"]
    (tmp_path / "a.TXT").write_text("text")
    with pytest.raises(UserError, match="holds no image and no video"):
        list_media(tmp_path)
    (tmp_path / "broken.JPG").write_text("no picture")
    with pytest.raises(MediaError, match=r"broken\.JPG"):
        evaluate_folder(config(folder, data=str(tmp_path), sizes=[32]))
