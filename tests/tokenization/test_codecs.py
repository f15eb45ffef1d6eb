"""Clips of many codecs and kinds through a whole job, and the tool's names of options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from emu3_megatron.data import MultimodalDataset
from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Dialect, Video
from emu3_megatron.media import Preprocessor, ResizeRule
from emu3_megatron.text import load_text_tokenizer
from emu3_megatron.tokenization import Inputs, TokenizationConfig, choose_vocabulary, tokenize
from emu3_megatron.vision import VisionTokenizer
from tests.media.clips import add_sound, decode_in_order, encode, moving_picture
from tests.tokenization.conftest import Tokenizers
from tools.tokenize_media import make_parser

MakeConfig = Callable[..., TokenizationConfig]

CODECS: dict[str, dict[str, Any]] = {
    "hevc.mp4": {"encoder": "libx265", "options": {"x265-params": "log-level=none"}},
    "av1.mp4": {"encoder": "libsvtav1", "options": {"preset": "10"}},
    "mpeg4.avi": {"encoder": "mpeg4"},
    "odd.webm": {"encoder": "libvpx-vp9", "odd": True},
    "variable.mkv": {"ticks": [0, 40, 80, 120, 400, 440, 1000, 1040, 1080, 2000, 2040, 3000]},
    "variable.avi": {"encoder": "mpeg4", "ticks": [0, 1, 2, 3, 8, 9, 10, 11, 12, 20, 21, 22], "rate": 1000},
    "sound.mp4": {"sound": True},
}
"""Clips by name; the encoder is libx264 where none is given."""


def test_clips_of_every_kind_become_the_codes_of_their_frames(
    tmp_path: Path, tokenizers: Tokenizers, make_config: MakeConfig
) -> None:
    """The frames are those that PyAV gives when it decodes from the beginning."""
    names = {
        name: kind
        for name, kind in CODECS.items()
        if kind.get("encoder", "libx264") in av.codecs_available or "encoder" not in kind
    }
    for name, kind in names.items():
        settings = {key: value for key, value in kind.items() if key not in ("odd", "sound")}
        pictures = moving_picture(12)[:, : 95 if kind.get("odd") else 96, : 127 if kind.get("odd") else 128]
        encode(tmp_path / name, np.ascontiguousarray(pictures), **settings)
        if kind.get("sound"):
            add_sound(tmp_path / name)
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps({"id": name, "video": name}) + "\n" for name in names))
    assert tokenize(make_config(manifest, tmp_path / "data", encode_pixels=1, quarantine_budget=0.0))
    dataset = MultimodalDataset.open(tmp_path / "data")
    vision = VisionTokenizer.from_pretrained(tokenizers["vision_tokenizer"])
    text = load_text_tokenizer(tokenizers["text_tokenizer"])
    dialect = Dialect.preset("emu3", choose_vocabulary("auto", text, vision), text)
    for index, name in enumerate(names):
        frames = np.stack(decode_in_order(tmp_path / name)[:8])
        (pixels,) = Preprocessor()([frames], [ResizeRule(area=64 * 64).plan(*frames.shape[1:3])])
        ((ids, _),) = dataset.document(index)
        span = dialect.parse_span(ids)
        assert isinstance(span, Video)
        assert np.array_equal(span.codes, vision.encode(pixels[None])[0].numpy()), name


def test_options_have_the_names_of_other_tools_too(tmp_path: Path, corpus: Path) -> None:
    always = ["--manifest", str(corpus), "--output", str(tmp_path), "--text-tokenizer", "t"]
    ours = ["--worker", "1", "--quarantine-budget", "0.2"]
    theirs = ["--worker-index", "1", "--max-bad-fraction", "0.2"]
    parse = make_parser().parse_args
    assert parse([*always, *ours]) == parse([*always, *theirs])
    assert parse([*always, "--samples-per-shard", "7"]).samples_per_shard == 7
    inputs = Inputs([corpus])
    assert [inputs.shards_of(samples) for samples in (1, 7, 18, 36, 100)] == [36, 6, 2, 1, 1]
    with pytest.raises(UserError, match="samples_per_shard=0"):
        inputs.shards_of(0)
