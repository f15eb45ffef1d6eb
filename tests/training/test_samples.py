from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from emu3_megatron.samples.tiny import CODEBOOK
from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig
from tests.training import runs


@pytest.mark.slow
def test_pictures_stand_in_tensorboard_and_change_nothing(
    tmp_path: Path, config_file: Path, tiny_data: Path, reference: Path
) -> None:
    vision = VisionTokenizerConfig(
        channels=32,
        channel_multiplier=(1, 1, 1, 1),
        num_res_blocks=0,
        attention_resolutions=(),
        codebook_size=CODEBOOK,
    )
    VisionTokenizer(vision).eval().save_pretrained(tmp_path / "vision")
    run = tmp_path / "run"
    done = runs.train(
        config_file,
        run,
        *("--samples.interval", "15", "--samples.prompts", '["a red square", "a blue circle"]'),
        *("--samples.height", "32", "--samples.width", "32"),
        *("--samples.vision_tokenizer", str(tmp_path / "vision")),
        *("--samples.text_tokenizer", str(tiny_data / "tokenizer.model")),
    )
    assert done.returncode == 0, done.stderr
    assert runs.largest_difference(runs.metrics(run), runs.metrics(reference)) == 0.0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == ["samples/00 a red square", "samples/01 a blue circle"]
    drawn = events.Images("samples/00 a red square")
    assert [image.step for image in drawn] == [15, 20]
    assert (drawn[0].height, drawn[0].width) == (32, 32)
