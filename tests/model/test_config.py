import pytest

from emu3_megatron.model import ModelConfig, ModelConfigError
from emu3_megatron.model.config import PRESETS, AttentionBackend
from emu3_megatron.parallel.config import ContextCommunication, LayoutError, ParallelConfig
from emu3_megatron.vocabulary import Vocabulary


def test_emu3_has_the_published_number_of_parameters() -> None:
    count = ModelConfig.preset("emu3_8b").parameter_count(Vocabulary.preset("emu3").size)
    assert count == 8_492_011_520  # the paper says 8.49B


def test_emu3_5_has_the_published_number_of_parameters() -> None:
    config, vocabulary = ModelConfig.preset("emu3.5_34b"), Vocabulary.preset("emu3.5")
    total = config.parameter_count(vocabulary.size)
    layers = total - 2 * vocabulary.size * config.hidden_size
    assert round(total / 1e9, 1) == 34.1
    assert round(layers / 1e9, 1) == 31.2


def test_ablation_size_is_near_its_name() -> None:
    count = ModelConfig.preset("emu3_1_5b").parameter_count(Vocabulary.preset("emu3").size)
    assert 1.4e9 < count < 1.6e9


def test_emu3_drops_out_in_all_four_places() -> None:
    config = ModelConfig.preset("emu3_8b")
    assert (config.embedding_dropout, config.attention_dropout, config.hidden_dropout) == (0.1, 0.1, 0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_can_be_overridden(name: str) -> None:
    config = ModelConfig.preset(name, num_layers=2)
    config.validate(ParallelConfig(pipeline_model_parallel_size=2))
    assert config.num_layers == 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"num_layers": 0}, ["num_layers=0", "at least 1"]),
        ({"num_attention_heads": 6}, ["hidden_size=128", "num_attention_heads=6"]),
        ({"num_query_groups": 3}, ["num_query_groups=3"]),
        ({"kv_channels": 5}, ["head size 5", "even"]),
        ({"attention_dropout": 1.0}, ["attention_dropout=1.0", "[0, 1)"]),
        ({"attention_backend": "fast"}, ["'fast'", "transformer_engine"]),
        ({"recompute": "some"}, ["'some'", "selective"]),
        ({"dropout": 0.1}, ["unknown model fields", "dropout"]),
    ],
)
def test_impossible_shapes_are_refused_in_one_line(overrides: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ModelConfigError) as raised:
        ModelConfig.preset("tiny", **overrides).validate()
    message = str(raised.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"tensor_model_parallel_size": 4}, ["num_query_groups=2", "tensor_model_parallel_size=4"]),
        ({"pipeline_model_parallel_size": 3}, ["num_layers=4", "3 pipeline stages"]),
        ({"context_parallel_size": 8, "cp_comm": "a2a"}, ["4 query heads", "all_gather"]),
        ({"sequence_parallel": True}, ["sequence_parallel", "tensor_model_parallel_size"]),
        ({"virtual_pipeline_model_parallel_size": 2}, ["virtual", "pipeline_model_parallel_size >= 2"]),
        ({"context_parallel_size": 0}, ["context_parallel_size=0"]),
        ({"cp_comm": "ring"}, ["'ring'", "a2a", "p2p"]),
    ],
)
def test_layouts_that_do_not_fit_are_refused_in_one_line(layout: dict[str, int], words: list[str]) -> None:
    with pytest.raises(LayoutError) as raised:
        ModelConfig.preset("tiny").validate(ParallelConfig(**layout))  # type: ignore[arg-type]
    message = str(raised.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("backend", "cp_comm", "remedy"),
    [
        ("transformer_engine", "all_gather", "only p2p; set cp_comm to auto"),
        ("transformer_engine", "a2a", "only p2p; set cp_comm to auto"),
        ("torch", "p2p", "only all_gather and a2a; set cp_comm to auto"),
    ],
)
def test_an_exchange_that_the_attention_does_not_have_is_refused_in_one_line(
    backend: AttentionBackend, cp_comm: ContextCommunication, remedy: str
) -> None:
    config = ModelConfig.preset("tiny", attention_backend=backend)
    config.validate(ParallelConfig(cp_comm=cp_comm))  # nothing is exchanged
    with pytest.raises(LayoutError, match=remedy) as raised:
        config.validate(ParallelConfig(context_parallel_size=2, cp_comm=cp_comm))
    assert "\n" not in str(raised.value)
    config.validate(ParallelConfig(context_parallel_size=2))


def test_a_world_that_cannot_be_divided_is_refused() -> None:
    layout = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2)
    assert layout.data_parallel_size(8) == 2
    with pytest.raises(LayoutError, match="6 processes"):
        layout.data_parallel_size(6)
