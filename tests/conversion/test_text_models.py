from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from emu3_megatron.conversion.checkpoints import read_weights
from emu3_megatron.conversion.rules import ConversionError
from emu3_megatron.conversion.text_models import import_text_model, new_rows
from emu3_megatron.parallel.context import packed_sequence_parameters
from emu3_megatron.training.checkpoint import load_model_for_inference
from emu3_megatron.vocabulary import Vocabulary
from tests.inference import worlds

TEXT, CODES = 300, 64
VOCABULARY = Vocabulary.build("extended", text_size=TEXT, codebook_size=CODES)
SHAPE = {
    "vocab_size": TEXT + 20,  # text models have spare rows
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with worlds.one_process():
        yield


def text_model(kind: str, *, tied: bool) -> torch.nn.Module:
    torch.manual_seed(4)
    if kind == "llama":
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SHAPE, tie_word_embeddings=tied, attention_bias=False)
        )
    elif kind == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE, tie_word_embeddings=tied))
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                torch.nn.init.normal_(projection.bias)
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE, tie_word_embeddings=tied))
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", False), ("llama", True), ("qwen2", False), ("qwen3", True)]
)
def test_text_ids_keep_their_logits_and_new_ids_look_like_old_ones(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    theirs = text_model(kind, tied=tied)
    theirs.save_pretrained(tmp_path / "text")
    import_text_model(tmp_path / "text", tmp_path / "run", VOCABULARY)
    (ours,), _, vocabulary = load_model_for_inference(tmp_path / "run")
    assert vocabulary == VOCABULARY
    tokens = torch.randint(0, TEXT, (1, 40), generator=torch.Generator().manual_seed(1))
    packed = packed_sequence_parameters(torch.tensor([0, 40], dtype=torch.int32))
    with torch.no_grad():
        logits = ours(tokens, packed_seq_params=packed, logits="all")
        expected = theirs(tokens).logits
    assert logits.shape[-1] == VOCABULARY.size
    torch.testing.assert_close(logits[..., :TEXT], expected[..., :TEXT], rtol=1e-4, atol=1e-4)
    weights = read_weights(tmp_path / "run")
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        old, new = weights[name][:TEXT], weights[name][TEXT:]
        assert len(new) == VOCABULARY.size - TEXT
        assert new.std().item() == pytest.approx(old.std().item(), rel=0.2)
        assert len(new.unique(dim=0)) == len(new)


def test_new_rows_have_the_mean_and_the_covariance_of_the_old() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(8, 8, generator=generator)
    old = torch.randn(4000, 8, generator=generator) @ mix + torch.arange(8.0)
    new = torch.empty(4000, 8)
    new_rows(old, new, generator)
    scale = old.std()
    torch.testing.assert_close(new.mean(0), old.mean(0), rtol=0, atol=0.1 * scale.item())
    torch.testing.assert_close(new.t().cov(), old.t().cov(), rtol=0.1, atol=0.1 * scale.item() ** 2)


def test_the_same_seed_gives_the_same_rows(tmp_path: Path) -> None:
    text_model("llama", tied=False).save_pretrained(tmp_path / "text")
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        import_text_model(tmp_path / "text", tmp_path / name, VOCABULARY, seed=seed)
    one, again, other = (read_weights(tmp_path / name) for name in ("one", "again", "other"))
    key = "output_layer.weight"
    assert torch.equal(one[key], again[key])
    assert not torch.equal(one[key][TEXT:], other[key][TEXT:])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    text_model("llama", tied=False).save_pretrained(tmp_path / "text")
    wide = Vocabulary.build("wide", text_size=TEXT + 21, codebook_size=CODES)
    with pytest.raises(ConversionError, match="fewer than the 321 text ids"):
        import_text_model(tmp_path / "text", tmp_path / "run", wide)
    config = tmp_path / "text" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"gpt2"'))
    with pytest.raises(ConversionError, match="model_type='gpt2'"):
        import_text_model(tmp_path / "text", tmp_path / "run", VOCABULARY)
