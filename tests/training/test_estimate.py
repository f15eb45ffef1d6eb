from __future__ import annotations

import pytest

from emu3_megatron.errors import UserError
from emu3_megatron.training import command_line, predict
from emu3_megatron.training.config import TrainingConfig
from emu3_megatron.training.estimate import rank_memory
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
    first = text.splitlines()[2].split()
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
    gpu = predict.predict(asked(), ["--config", str(STAGE1)])
    cpu = predict.predict(asked(), ["--config", str(STAGE1), "--platform", "cpu"])
    assert "allocator" not in gpu
    assert "allocator" in cpu
    assert "code 25.0 MiB" in cpu
    chunk = ("--loss.chunk_size", "128")  # the default is larger on a GPU
    devices = rank_memory(stage1(*chunk), 64, EMU3.padded_size)
    processes = rank_memory(stage1(*chunk, "--platform", "cpu"), 64, EMU3.padded_size)
    assert devices.total == devices.in_use == processes.in_use < processes.total
