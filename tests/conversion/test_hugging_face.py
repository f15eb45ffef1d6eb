"""An exported folder is a transformers model with the same numbers, and comes back bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from emu3_megatron.conversion import ConversionError, ExportedModel, export_hugging_face, open_hugging_face
from emu3_megatron.errors import UserError
from emu3_megatron.text import train_sentencepiece
from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig
from emu3_megatron.vocabulary import Vocabulary
from tests.inference import worlds

TEXTS = ["a small red circle at the top left", "一个大的蓝色正方形在右下角", "two green stars 3.5 x"] * 3
VISION = VisionTokenizerConfig(
    channels=32, channel_multiplier=(1, 1), num_res_blocks=1, attention_resolutions=(1,), codebook_size=64
)


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with worlds.one_process():
        yield


@pytest.fixture(scope="module")
def vision() -> VisionTokenizer:
    torch.manual_seed(0)
    return VisionTokenizer(VISION).eval()


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "captions.model"
    train_sentencepiece(TEXTS, path, 320)
    return path


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.build("exported", text_size=350, codebook_size=64)


def build(config, vocabulary: Vocabulary):
    from emu3_megatron.model import build_model
    from emu3_megatron.parallel.config import ParallelConfig

    (model,) = build_model(
        config,
        vocabulary_padded_size=vocabulary.padded_size,
        vocabulary_size=vocabulary.size,
        parallel=ParallelConfig(),
        seed=0,
    )
    return model.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, vision, text_tokenizer, vocabulary):
    """(folder, our model) of one exported model with tokenizer."""
    config = worlds.model_config()
    model = build(config, vocabulary)
    folder = tmp_path_factory.mktemp("export") / "hf"
    export_hugging_face(
        folder,
        model.state_dict(),
        ExportedModel(config=config, vocabulary=vocabulary, dialect="emu3"),
        vision_tokenizer=vision,
        text_tokenizer=text_tokenizer,
        image_pixels=(4, 64 * 64),
    )
    return folder, model


def our_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits of one sequence by our model's training forward pass."""
    from emu3_megatron.parallel.context import packed_sequence_parameters

    parameters = packed_sequence_parameters(torch.tensor([0, ids.shape[1]], dtype=torch.int32))
    with torch.no_grad():
        return model(ids, packed_seq_params=parameters, logits="all")[0]


@pytest.mark.parametrize("layout", ["transformers", "transformers-5", "emu3"])
@pytest.mark.parametrize(
    "shape",
    [
        {"num_query_groups": 1},
        {"num_query_groups": 2},
        {"num_query_groups": 4},
        {"num_query_groups": 2, "kv_channels": 16, "rotary_base": 10_000, "layernorm_epsilon": 1e-3},
    ],
    ids=str,
)
def test_logits_equal_transformers(layout: str, shape: dict, tmp_path: Path, vision, vocabulary) -> None:
    config = worlds.model_config(**shape)
    model = build(config, vocabulary)
    about = ExportedModel(config=config, vocabulary=vocabulary)
    export_hugging_face(tmp_path / "hf", model.state_dict(), about, vision_tokenizer=vision, layout=layout)
    if layout == "emu3":
        values = json.loads((tmp_path / "hf" / "config.json").read_text())
        values.update(model_type="emu3_text_model")
        theirs = transformers.Emu3ForCausalLM.from_pretrained(
            tmp_path / "hf", config=transformers.models.emu3.configuration_emu3.Emu3TextConfig(**values)
        )
    else:
        theirs = transformers.Emu3ForConditionalGeneration.from_pretrained(tmp_path / "hf")
    ids = torch.randint(0, vocabulary.size, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids).logits[0]
    ours = our_logits(model, ids)
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < 1e-4
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))


def test_codes_and_pixels_equal_transformers(exported, vision) -> None:
    folder, _ = exported
    theirs = transformers.Emu3ForConditionalGeneration.from_pretrained(folder).eval()
    pixels = torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        output = theirs.model.vqmodel.encode(pixels, torch.tensor([[16, 12]] * 2))
        ours = vision.encode(pixels)
        assert torch.equal(torch.stack(list(output.image_tokens)), ours)
        torch.testing.assert_close(
            theirs.model.vqmodel.decode(ours), vision.decode(ours), atol=1e-4, rtol=1e-4
        )


def test_vision_tokenizer_comes_back(exported, vision) -> None:
    assert VisionTokenizer.from_pretrained(exported[0]).fingerprint == vision.fingerprint


@pytest.mark.parametrize("layout", ["transformers", "transformers-5", "emu3"])
def test_round_trip_is_bit_equal(layout: str, tmp_path: Path, vision, vocabulary) -> None:
    """Weights, configuration and vocabulary come back; padding rows come back as zeros."""
    config = worlds.model_config(kv_channels=16)
    weights = build(config, vocabulary).state_dict()
    about = ExportedModel(config=config, vocabulary=vocabulary, dialect="emu3-frames")
    export_hugging_face(tmp_path / "a", weights, about, vision_tokenizer=vision, layout=layout)
    opened = open_hugging_face(tmp_path / "a")
    assert (opened.config, opened.vocabulary, opened.dialect) == (config, vocabulary, "emu3-frames")
    back = dict(opened.weights())
    plain = {name: tensor for name, tensor in weights.items() if not name.endswith("_extra_state")}
    assert set(back) == set(plain)
    for name, tensor in plain.items():
        used = vocabulary.size if "word_embeddings" in name or "output_layer" in name else len(tensor)
        assert torch.equal(back[name][:used], tensor[:used]), name
        assert not back[name][used:].any(), name
    export_hugging_face(tmp_path / "b", back, about, vision_tokenizer=vision, layout=layout)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_folder_without_our_file_is_understood(exported, vocabulary) -> None:
    """A folder of transformers alone gives the same shapes and the same ids."""
    folder, model = exported
    (folder / "emu3_megatron.json").rename(folder / "aside")
    try:
        opened = open_hugging_face(folder)
    finally:
        (folder / "aside").rename(folder / "emu3_megatron.json")
    assert opened.vocabulary.control_ids == vocabulary.control_ids
    assert opened.vocabulary.vision_offset == vocabulary.vision_offset
    assert opened.config.hidden_size == model.config.hidden_size
    assert {name: tuple(t.shape) for name, t in opened.weights()} == {
        name: tuple(t.shape) for name, t in model.state_dict().items() if not name.endswith("_extra_state")
    }


def test_processor_and_tokenizer_load_and_agree(exported, text_tokenizer, vocabulary) -> None:
    from emu3_megatron.text import load_text_tokenizer

    folder, _ = exported
    processor = transformers.Emu3Processor.from_pretrained(folder)
    ours = load_text_tokenizer(text_tokenizer)
    for text in [*TEXTS, "never seen: ß 漢 😀"]:
        assert processor.tokenizer(text, add_special_tokens=False).input_ids == ours.encode(text)
        assert processor.tokenizer.decode(ours.encode(text)) == text
    inputs = processor(
        text=["a red circle"],
        return_for_image_generation=True,
        ratio="1:1",
        image_area=64 * 64,
        return_tensors="pt",
    )
    ids = inputs.input_ids[0].tolist()
    assert ids[0] == vocabulary.bos
    assert ids[-1] == vocabulary.img
    assert vocabulary.boi in ids
    names = json.loads((folder / "config.json").read_text())["vocabulary_map"]
    assert names["<image>"] == vocabulary.text_size + 3
    assert names["<|visual token 000063|>"] == vocabulary.size - 1
    assert names["<|extra_200|>"] == vocabulary.eol
    assert len(names) == vocabulary.size


def test_bf16_export(tmp_path: Path, vision, vocabulary) -> None:
    config = worlds.model_config()
    weights = build(config, vocabulary).state_dict()
    about = ExportedModel(config=config, vocabulary=vocabulary)
    export_hugging_face(tmp_path / "hf", weights, about, vision_tokenizer=vision, dtype=torch.bfloat16)
    back = dict(open_hugging_face(tmp_path / "hf").weights())
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert torch.equal(back[name], weights[name].bfloat16())


def test_unusable_exports_are_refused(tmp_path: Path, vision, vocabulary, text_tokenizer) -> None:
    config = worlds.model_config()
    weights = build(config, vocabulary).state_dict()
    about = ExportedModel(config=config, vocabulary=vocabulary)

    def export(weights=weights, about=about, **more) -> None:
        export_hugging_face(tmp_path / "hf", weights, about, **{"vision_tokenizer": vision, **more})

    with pytest.raises(ConversionError, match="vision tokenizer"):
        export(vision_tokenizer=None)
    with pytest.raises(ConversionError, match="unknown layout"):
        export(layout="onnx")
    broken = {name: t for name, t in weights.items() if "final_layernorm" not in name}
    broken["surplus"] = torch.zeros(1)
    broken["output_layer.weight"] = torch.zeros(3, 3)
    with pytest.raises(
        ConversionError, match=r"missing decoder.final_layernorm.*unexpected surplus.*\[3, 3\]"
    ):
        export(weights=broken)
    small = Vocabulary.build("small", text_size=200, codebook_size=64)
    with pytest.raises(ConversionError, match="more than the 200 text ids"):
        export(about=ExportedModel(config=config, vocabulary=small), text_tokenizer=text_tokenizer)
    other = Vocabulary.build("other", text_size=350, codebook_size=65)
    with pytest.raises(ConversionError, match="64 codes"):
        export(about=ExportedModel(config=config, vocabulary=other))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "precious").touch()
    with pytest.raises(UserError, match="exists"):
        export()
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["precious"]


def test_damaged_folders_are_refused(exported, tmp_path: Path) -> None:
    folder, _ = exported
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "emu3_megatron.json"):
        (copy / name).write_bytes((folder / name).read_bytes())
    whole = (folder / "model.safetensors").read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(ConversionError, match=match):
            list(open_hugging_face(copy).weights())

    refused("neither")
    (copy / "pytorch_model.bin").touch()
    refused("pickled")
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("damaged")
    (copy / "model.safetensors").write_bytes(whole)
    assert list(open_hugging_face(copy).weights())
    index = copy / "model.safetensors.index.json"
    for entry, match in (("../model.safetensors", "plain file name"), ("gone.safetensors", "missing")):
        index.write_text(json.dumps({"weight_map": {"x": entry}}))
        refused(match)
    index.write_text(json.dumps({"weight_map": {"x": "model.safetensors"}}))
    refused("does not match")
    index.write_text("{")
    refused("not an index of weight files")
    (copy / "config.json").unlink()
    refused("config.json is missing")


def test_shards_have_an_index(tmp_path: Path) -> None:
    from emu3_megatron.conversion.lazy import InMemory
    from emu3_megatron.conversion.tensor_files import TensorFiles, write_tensors

    tensors = {f"t{index}": torch.full((10,), float(index)) for index in range(5)}
    write_tensors(tmp_path, InMemory(tensors), shard_bytes=80)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)
    ]
    files = TensorFiles(tmp_path)
    assert all(torch.equal(files[name], tensor) for name, tensor in tensors.items())
    assert np.all([files.shape(name) == (10,) for name in files])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_transformers_prefers_our_greedy_tokens(
    exported, text_tokenizer, vocabulary, guidance: float
) -> None:
    """Forced along an image of our engine, transformers gives every token of it the best (guided) logit."""
    from emu3_megatron.grammar import Dialect
    from emu3_megatron.inference import Engine, Request, Sampling
    from emu3_megatron.text import load_text_tokenizer

    folder, model = exported
    dialect = Dialect.preset("emu3", vocabulary, load_text_tokenizer(text_tokenizer))
    span = dialect.open_span(3, 4)
    prompt, negative = (
        np.concatenate([[vocabulary.bos], dialect.encode_text(text), span])
        for text in ("a small red circle", "")
    )
    request = Request(
        prompt=prompt,
        negative_prompt=negative,
        sampling=Sampling(temperature=0, guidance=guidance),
        stop=frozenset([vocabulary.eoi]),
    )
    (completion,) = Engine(model, dialect).generate([request])
    theirs = transformers.Emu3ForConditionalGeneration.from_pretrained(folder).eval()

    def logits(start: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(np.concatenate([start, completion.ids]))[None]
        with torch.no_grad():
            return theirs(input_ids=ids).logits[0, len(start) - 1 : -1, vocabulary.vision_offset :]

    one, other = logits(prompt), logits(negative)
    guided = other + guidance * (one - other)
    drawn = [index for index, token in enumerate(completion.ids) if token >= vocabulary.vision_offset]
    assert len(drawn) == 12
    for index in drawn:
        chosen = guided[index, completion.ids[index] - vocabulary.vision_offset]
        assert chosen >= guided[index].max() - 1e-4


@pytest.mark.parametrize(
    ("shape", "kind"),
    [({"qk_layernorm": True}, "Qwen3ForCausalLM"), ({"qkv_bias": True}, "Qwen2ForCausalLM")],
)
def test_models_that_emu3_has_not_load_as_what_they_are(
    tmp_path: Path, vocabulary, shape: dict, kind: str
) -> None:
    """Emu3.5-shaped models, and those with biases: equal logits, and back without our file."""
    config = worlds.model_config(**shape, kv_channels=8)
    model = build(config, vocabulary)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    about = ExportedModel(config=config, vocabulary=vocabulary)
    with pytest.raises(ConversionError, match="--layout emu3"):
        export_hugging_face(
            tmp_path / "no", model.state_dict(), about, vision_tokenizer=VisionTokenizer(VISION)
        )
    export_hugging_face(tmp_path / "hf", model.state_dict(), about, layout="emu3")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(theirs).__name__ == kind
    ids = torch.randint(0, vocabulary.size, (1, 40), generator=generator)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits[0]
    assert (our_logits(model, ids) - expected).abs().max() < 1e-4
    (tmp_path / "hf" / "emu3_megatron.json").unlink()
    opened = open_hugging_face(tmp_path / "hf")
    assert opened.vocabulary.control_ids == vocabulary.control_ids
    assert (opened.config.qk_layernorm, opened.config.qkv_bias) == (config.qk_layernorm, config.qkv_bias)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in opened.weights())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_types_are_kept_exactly(tmp_path: Path, vocabulary, dtype: torch.dtype) -> None:
    """A folder that transformers wrote, of half precision too: imported and exported, the same bytes."""
    from safetensors.torch import load_file

    from emu3_megatron.conversion.checkpoints import export_checkpoint, import_checkpoint

    config = worlds.model_config()
    about = ExportedModel(config=config, vocabulary=vocabulary)
    export_hugging_face(
        tmp_path / "a", build(config, vocabulary).state_dict(), about, layout="emu3", dtype=dtype
    )
    import_checkpoint(tmp_path / "a", tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "b", layout="emu3")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert {name: tensor.dtype for name, tensor in one.items()} == dict.fromkeys(one, dtype)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("start", ["emu3", "transformers"])
def test_a_vision_tokenizer_alone_goes_both_ways(tmp_path: Path, vision, start: str) -> None:
    from emu3_megatron.conversion.vision_files import convert_vision_tokenizer

    other = "transformers" if start == "emu3" else "emu3"
    vision.save_pretrained(tmp_path / "a", layout=start)
    convert_vision_tokenizer(tmp_path / "a", tmp_path / "b", layout=other)
    convert_vision_tokenizer(tmp_path / "b", tmp_path / "c", layout=start)
    for folder in "bc":
        assert VisionTokenizer.from_pretrained(tmp_path / folder).fingerprint == vision.fingerprint
    config, changed = tmp_path / "a" / "config.json", tmp_path / "b" / "config.json"
    assert json.loads(config.read_text())["model_type"] != json.loads(changed.read_text())["model_type"]
    if other == "transformers":
        transformers.Emu3VQVAE.from_pretrained(tmp_path / "b")
