"""An exported folder generates in transformers, greedily, the tokens that our engine does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from emu3_megatron.conversion import ExportedModel, export_hugging_face
from emu3_megatron.grammar import Dialect
from emu3_megatron.inference import Engine, Request, Sampling
from emu3_megatron.text import load_text_tokenizer, train_sentencepiece
from emu3_megatron.vision import VisionTokenizer
from emu3_megatron.vocabulary import Vocabulary
from tests.conversion.test_hugging_face import TEXTS, VISION, build, our_logits
from tests.inference import worlds

NEAR = 1e-4
"""Two best logits that differ by less are a tie: fp32 may break it either way."""


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with worlds.one_process():
        yield


def test_greedy_images_are_equal_token_for_token(tmp_path: Path) -> None:
    """`generate` under the rules for an image; transformers' processor makes the prompt, its model the
    pixels."""
    vocabulary = Vocabulary.build("exported", text_size=350, codebook_size=64)
    train_sentencepiece(TEXTS, tmp_path / "text.model", 320)
    config = worlds.model_config()
    model = build(config, vocabulary)
    torch.manual_seed(0)
    export_hugging_face(
        tmp_path / "hf",
        model.state_dict(),
        ExportedModel(config=config, vocabulary=vocabulary, dialect="emu3"),
        vision_tokenizer=VisionTokenizer(VISION).eval(),
        text_tokenizer=tmp_path / "text.model",
        image_pixels=(4, 64 * 64),
    )
    processor = transformers.Emu3Processor.from_pretrained(tmp_path / "hf")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "hf").eval()
    assert isinstance(theirs, transformers.Emu3ForConditionalGeneration)
    prompts = processor(
        text=["a small red circle"],
        return_for_image_generation=True,
        ratio="4:3",
        image_area=24 * 32,
        return_tensors="pt",
    )
    height, width = (int(size) for size in prompts.image_sizes[0])
    # The size is text: SentencePiece may cut it otherwise than our grammar, which both must then be given.
    dialect = Dialect.preset("emu3", vocabulary, load_text_tokenizer(tmp_path / "text.model"))
    text = dialect.encode_text("a small red circle")
    prompt = np.concatenate([[vocabulary.bos], text, dialect.open_span(height, width)])
    assert prompts.input_ids[0, : len(text) + 2].tolist() == prompt[: len(text) + 2].tolist()
    assert prompts.input_ids[0, -1] == prompt[-1] == vocabulary.img
    ids = torch.from_numpy(prompt)[None]
    generated = generate(theirs, ids, vocabulary, height, width)
    request = Request(prompt=prompt, sampling=Sampling(temperature=0), stop=frozenset([vocabulary.eoi]))
    (completion,) = Engine(model, dialect).generate([request])
    length = (width + 1) * height + 1  # rows and the end of the frame; what follows is no choice
    ours = torch.from_numpy(np.asarray(completion.ids))[:length]
    assert generated[length:].tolist() == [vocabulary.eoi, vocabulary.eos]
    whole = torch.cat([ids[0], ours])[None]
    forced = our_logits(model, whole)
    with torch.no_grad():
        assert (forced - theirs(input_ids=whole).logits[0]).abs().max() < 1e-4
    ties = 0
    for step in (ours != generated[:length]).nonzero().flatten().tolist():
        options = allowed(vocabulary, step, height, width)
        best = forced[ids.shape[1] + step - 1, options].topk(2).values
        assert best[0] - best[1] < NEAR, f"step {step} of {len(ours)}"
        ties += 1
        break  # after a tie the two go on from different images
    assert ties == 0, "no step of this model is a tie"
    pixels = theirs.model.decode_image_tokens(generated[None, :], height=height, width=width)
    assert pixels.shape[1:] == (3, 2 * height, 2 * width)


def generate(
    theirs: torch.nn.Module, ids: torch.Tensor, vocabulary: Vocabulary, height: int, width: int
) -> torch.Tensor:
    """The tokens that transformers adds, each the likeliest that is allowed."""
    with torch.no_grad():
        return theirs.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            top_k=None,
            max_new_tokens=(width + 1) * height + 3,
            prefix_allowed_tokens_fn=lambda _, given: allowed(
                vocabulary, len(given) - ids.shape[1], height, width
            ),
        )[0, ids.shape[1] :]


def allowed(vocabulary: Vocabulary, step: int, height: int, width: int) -> list[int]:
    """Tokens that Emu3's rules allow at a step after the image token."""
    last = (width + 1) * height
    if step < last:
        if step % (width + 1) == width:
            return [vocabulary.eol]
        return list(range(vocabulary.vision_offset, vocabulary.size))
    return [(vocabulary.eof, vocabulary.eoi, vocabulary.eos)[step - last]]
