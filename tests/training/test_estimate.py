from __future__ import annotations

from dataclasses import replace

import pytest

from emu3_megatron.errors import UserError
from emu3_megatron.parallel import platform
from emu3_megatron.posttraining.preferences.config import PreferenceTrainingConfig
from emu3_megatron.training import command_line, predict
from emu3_megatron.training.config import TrainingConfig
from emu3_megatron.training.estimate import adapter_parameters, rank_memory
from emu3_megatron.training.step_time import Cluster, search, step_time
from emu3_megatron.vocabulary import Vocabulary
from tests import programs

STAGE1 = programs.ROOT / "examples/configs/emu3-8b/stage1.yaml"
STAGE2 = programs.ROOT / "examples/configs/emu3-8b/stage2.yaml"
EMU3 = Vocabulary.preset("emu3")


def asked(**options: object) -> dict[str, object]:
    return {
        "processes": 64,
        "vocabulary": "emu3",
        "search": False,
        "top": 5,
        "document_tokens": 4300,
        **options,
    }


def stage1(*arguments: str) -> TrainingConfig:
    return command_line.parse(["--config", str(STAGE1), "--world-size", "64", *arguments]).config


def test_a_prediction_states_its_assumptions_parameters_memory_and_time() -> None:
    text = predict.predict(asked(), ["--config", str(STAGE1)])
    for said in ("assumed", "989 TFLOP/s", "parameters", "memory of a rank", "time of a step", "tokens/s"):
        assert said in text
    assert "8,497,926,144" in text  # Emu3 8B with the padding of its vocabulary


def test_a_search_lists_layouts_that_fit_fastest_first() -> None:
    config = stage1(*predict.ONE_PROCESS)
    found = search(config, Cluster(processes=64), EMU3.size, EMU3.padded_size, 4300)
    times = [choice.time.total for choice in found]
    assert found
    assert times == sorted(times)
    assert all(choice.memory.total <= 74 * 2**30 for choice in found)


def test_long_windows_of_a_large_model_need_model_parallelism() -> None:
    text = predict.predict(asked(search=True), ["--config", str(STAGE2)])
    first = text.splitlines()[3].split()
    assert int(first[0]) * int(first[1]) * int(first[3]) > 1


def test_what_fits_nowhere_is_said() -> None:
    with pytest.raises(UserError, match="no layout of 64 devices with 8 GiB"):
        predict.predict(asked(search=True, memory_gib=8.0), ["--config", str(STAGE1)])


def test_more_devices_and_a_better_balanced_pipeline_are_faster() -> None:
    cluster = Cluster(processes=64)
    one = step_time(stage1(), cluster, EMU3.size, 4300)
    assert step_time(stage1(), Cluster(processes=128), EMU3.size, 4300).total < one.total
    deep = ["--parallel.pipeline_model_parallel_size", "4"]
    even = step_time(stage1(*deep), cluster, EMU3.size, 4300)
    balanced = step_time(stage1(*deep, "--parallel.layers_in_last_stage", "5"), cluster, EMU3.size, 4300)
    assert balanced.compute < even.compute
    assert even.bubble > 0


def test_without_a_vocabulary_the_way_out_is_named() -> None:
    with pytest.raises(UserError, match="--vocabulary"):
        predict.predict(asked(vocabulary=None), ["--config", str(STAGE1)])


def test_a_cpu_adds_its_allocator_and_code_and_says_so() -> None:
    gpu = predict.predict(asked(), ["--config", str(STAGE1), "--platform", "cuda"])
    cpu = predict.predict(asked(), ["--config", str(STAGE1), "--platform", "cpu"])
    assert "allocator" not in gpu
    assert "allocator" in cpu
    assert "code 25.0 MiB" in cpu
    chunk = ("--loss.chunk_size", "128", "--model.attention_dropout", "0")  # the others differ by platform
    devices = rank_memory(stage1(*chunk), 64, EMU3.padded_size)
    processes = rank_memory(stage1(*chunk, "--platform", "cpu"), 64, EMU3.padded_size)
    assert devices.total == devices.in_use == processes.in_use < processes.total


@pytest.mark.parametrize(("has_driver", "name"), [(False, "cpu"), (True, "cuda")])
def test_the_platform_is_that_of_the_machine_and_is_named(
    monkeypatch: pytest.MonkeyPatch, has_driver: bool, name: str
) -> None:
    def choose(asked: str = "auto") -> str:
        if has_driver:
            raise platform.PlatformError("a driver that does not work")
        return "cpu"

    monkeypatch.setattr(platform, "choose", choose)
    first, *rest = predict.predict(asked(), ["--config", str(STAGE1)]).splitlines()
    assert rest[0].startswith(f"platform          {name} (auto: this machine has ")
    given = predict.predict(asked(), ["--config", str(STAGE1), "--platform", name]).splitlines()
    assert given == [first, f"platform          {name}", *rest[1:]]
    searched = predict.predict(asked(search=True), ["--config", str(STAGE1)])
    assert "platform          cuda\n" in searched, "layouts are searched for a cluster"


def test_dropout_of_attention_takes_memory_on_a_cpu_by_the_squares_of_documents() -> None:
    cpu, kept = ("--platform", "cpu"), ("--model.recompute", "none")
    one, two = (rank_memory(stage1(*cpu, *kept), 64, EMU3.padded_size, length) for length in (1000, 2000))
    without = rank_memory(stage1(*cpu, *kept, "--model.attention_dropout", "0"), 64, EMU3.padded_size, 1000)
    gpu = [rank_memory(stage1(*kept), 64, EMU3.padded_size, length) for length in (1000, 2000)]
    assert without.activations < one.activations < two.activations
    assert gpu[0] == gpu[1]
    model = stage1().model
    # Of each of a rank's 16 heads: the softmax in fp32, its product in bf16, and a mask.
    more = model.num_layers * 16 * 7 * 1000 * 5120
    assert two.activations - one.activations == pytest.approx(more, rel=0.05)


def test_with_adapters_only_they_have_gradients_and_states() -> None:
    plain, adapted = stage1(), stage1("--lora.rank", "8", "--model.attention_backend", "torch")
    whole, thin = (rank_memory(config, 32, EMU3.padded_size) for config in (plain, adapted))
    count = adapter_parameters(adapted, tensor=2)
    assert 2 * count > adapter_parameters(adapted), "what is not split is on both ranks"
    assert adapter_parameters(plain) == 0
    assert thin.gradients == 4 * count
    assert thin.optimizer == 12 * count / 32
    assert thin.weights == whole.weights + 2 * count
    cluster = Cluster(processes=64)
    assert step_time(adapted, cluster, EMU3.size).total < step_time(plain, cluster, EMU3.size).total


def test_a_reference_in_memory_is_counted() -> None:
    recipe = ["--config", str(programs.ROOT / "examples/configs/emu3-8b/dpo-64gpu.yaml")]
    recipe += ["--world-size", "64"]
    cached, online = (
        command_line.parse_as(PreferenceTrainingConfig, [*recipe, "--dpo.reference_mode", mode]).config
        for mode in ("cached", "online")
    )
    one, two = (rank_memory(config, 16, EMU3.padded_size) for config in (cached, online))
    assert two.weights == 2 * one.weights
    assert replace(two, weights=one.weights) == one
    cluster = Cluster(processes=64)
    assert step_time(online, cluster, EMU3.size).total > step_time(cached, cluster, EMU3.size).total


def test_adapters_are_counted_as_they_are_made() -> None:
    from emu3_megatron.model import LoRAConfig, build_model
    from emu3_megatron.parallel.config import ParallelConfig
    from emu3_megatron.parallel.groups import destroy_parallel, initialize_parallel

    small = ["--model.hidden_size", "32", "--model.ffn_hidden_size", "48", "--model.num_attention_heads", "4"]
    small += ["--model.num_query_groups", "2", "--model.num_layers", "2", "--lora.rank", "3"]
    small += ["--lora.targets", '["linear_qkv", "linear_fc1", "linear_fc2"]']
    config = stage1(*small)
    initialize_parallel(ParallelConfig(), platform.install("cpu"), seed=0)
    try:
        from emu3_megatron.model.lora import add_adapters

        (model,) = build_model(
            config.model,
            vocabulary_size=1000,
            vocabulary_padded_size=1024,
            parallel=ParallelConfig(),
            seed=0,
            precision="fp32",
        )
        add_adapters(model, LoRAConfig(**vars(config.lora)), seed=0)
        trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    finally:
        destroy_parallel()
    assert adapter_parameters(config) == trained
