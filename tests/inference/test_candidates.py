"""Candidates drawn through the engine: resumable, shared among workers, kept as sampled; up to a pair."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from emu3_megatron.data import MultimodalDataset
from emu3_megatron.errors import UserError
from emu3_megatron.inference.bundle import ModelBundle
from emu3_megatron.inference.candidates import CandidateSettings, sample_candidates
from emu3_megatron.inference.sampling import Sampling
from emu3_megatron.inference.tasks import Generator
from emu3_megatron.media import load_stills
from emu3_megatron.posttraining.preferences.candidates import CandidateFolder
from emu3_megatron.posttraining.preferences.scores import mean_scores, read_folder, write_pairs
from emu3_megatron.posttraining.preferences.scoring import score_candidates
from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig
from tests.inference import worlds

PROMPTS = ["red", "a blue ring", "green", "no"]
SETTINGS = CandidateSettings(
    candidates=3, height=16, width=16, sampling=Sampling(guidance=2.0, top_k=16), negative_prompt="x"
)


@pytest.fixture(scope="module")
def generator() -> Iterator[Generator]:
    with worlds.one_process():
        torch.manual_seed(0)
        vision = VisionTokenizer(
            VisionTokenizerConfig(
                channels=32,
                channel_multiplier=(1, 1, 1, 1),
                num_res_blocks=0,
                attention_resolutions=(),
                codebook_size=worlds.VOCABULARY.codebook_size,
            )
        ).eval()
        model = worlds.tiny_model()
        yield Generator(ModelBundle(model, worlds.model_config(), worlds.dialect(), vision))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def draw(generator: Generator, path: Path, **options: int) -> CandidateFolder:
    return sample_candidates(generator, path, PROMPTS, SETTINGS, checkpoint="run", **options)


def test_killed_or_shared_the_folder_is_the_same(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = draw(generator, tmp_path / "whole")
    assert whole.finished() == [0, 1, 2, 3]
    expected = bytes_of(tmp_path / "whole")

    def killed(self: CandidateFolder, number: int, *rest: object) -> None:
        if number == 2:
            raise KeyboardInterrupt
        add(self, number, *rest)

    with monkeypatch.context() as patch:
        add = CandidateFolder.add
        patch.setattr(CandidateFolder, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            draw(generator, tmp_path / "killed", group=3)
    assert CandidateFolder(tmp_path / "killed").finished() == [0, 1]
    draw(generator, tmp_path / "killed", group=1)
    for worker in (1, 0):
        draw(generator, tmp_path / "shared", worker=worker, num_workers=2, group=2)
    for name in ("killed", "shared"):
        found = bytes_of(tmp_path / name)
        assert found.keys() == expected.keys()
        # Archives hold no time, so equal arrays are equal bytes.
        assert found == expected, name
    with pytest.raises(UserError, match=r"other settings .*prompts"):
        sample_candidates(generator, tmp_path / "whole", PROMPTS[:2], SETTINGS, checkpoint="run")


def test_tokens_are_those_that_were_sampled(generator: Generator, tmp_path: Path) -> None:
    folder = draw(generator, tmp_path / "candidates")
    language, vision = worlds.dialect(), generator.bundle.vision_tokenizer
    for number, prompt in enumerate(PROMPTS):
        own = folder.read(number)
        assert language.parse_text(own.prompt_ids.astype(np.int64)).text == prompt
        assert own.seeds == [3 * number, 3 * number + 1, 3 * number + 2]
        for place, span in enumerate(own.spans):
            codes = language.parse_span(span.astype(np.int64)).codes
            with torch.no_grad():
                decoded = vision.decode(torch.from_numpy(codes)[None])
            shown = load_stills([folder.image(number, place)], (16, 16))
            torch.testing.assert_close(shown, decoded.clamp(-1, 1), atol=1.1 / 127.5, rtol=0)


def test_from_prompts_to_pairs(generator: Generator, tmp_path: Path) -> None:
    folder = draw(generator, tmp_path / "candidates")
    score_candidates(folder, lambda prompt, pixels: {"red": float(pixels[..., 0].mean())}, "red")
    scores = mean_scores(read_folder(folder)[0])
    report = write_pairs(folder, tmp_path / "pairs", scores)
    dataset = MultimodalDataset.open(tmp_path / "pairs", vocabulary=worlds.VOCABULARY)
    assert report.pairs == len(dataset) == 4
    vision = generator.bundle.vision_tokenizer
    assert dataset.manifest.identity["vision tokenizer"] == vision.fingerprint
    for document in range(len(dataset)):
        red = []
        for span in (dataset.document(document)[place][0] for place in (1, 3)):
            codes = worlds.dialect().parse_span(span.astype(np.int64)).codes
            with torch.no_grad():
                red.append(vision.decode(torch.from_numpy(codes)[None])[0, 0].clamp(-1, 1).mean().item())
        assert red[0] > red[1]


@pytest.mark.parametrize(
    ("change", "message"), [({"candidates": 1}, "at least 2"), ({"seed": -1}, "must not be negative")]
)
def test_settings_that_cannot_work_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CandidateSettings(**change)
