import os
import subprocess
import sys

import pytest
import torch

from emu3_megatron.parallel import platform
from emu3_megatron.parallel.fused_adam import FusedAdam


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(platform, "driver_signs", list)
    return monkeypatch


def test_auto_takes_the_cpu_where_there_is_no_driver(no_cuda: pytest.MonkeyPatch) -> None:
    assert platform.choose("auto") == "cpu"


def test_auto_fails_where_a_driver_is_present_but_unusable(no_cuda: pytest.MonkeyPatch) -> None:
    no_cuda.setattr(platform, "driver_signs", lambda: ["/dev/nvidia0"])
    with pytest.raises(platform.PlatformError) as raised:
        platform.choose("auto")
    message = str(raised.value)
    assert "/dev/nvidia0" in message
    assert "platform: cpu" in message
    assert "\n" not in message


def test_cpu_may_be_chosen_on_a_gpu_machine(no_cuda: pytest.MonkeyPatch) -> None:
    no_cuda.setattr(platform, "driver_signs", lambda: ["/dev/nvidia0"])
    assert platform.choose("cpu") == "cpu"


def test_cuda_is_never_replaced_by_the_cpu(no_cuda: pytest.MonkeyPatch) -> None:
    with pytest.raises(platform.PlatformError, match="cuda is asked for"):
        platform.choose("cuda")


def test_cuda_is_taken_where_it_works(no_cuda: pytest.MonkeyPatch) -> None:
    no_cuda.setattr(torch.cuda, "is_available", lambda: True)
    assert platform.choose("auto") == platform.choose("cuda") == "cuda"


def test_unknown_platform_is_refused() -> None:
    with pytest.raises(ValueError, match="'tpu' is none of auto, cuda, cpu"):
        platform.choose("tpu")  # type: ignore[arg-type]


def test_nothing_is_redirected_on_cuda() -> None:
    """In a fresh process that believes in a GPU: `install` must leave torch as it is."""
    script = """
import torch
from emu3_megatron.parallel import platform
torch.cuda.is_available = lambda: True
chosen = []
torch.cuda.set_device = chosen.append
def state():
    return torch.cuda.current_device, torch.Tensor.cuda, torch.zeros, torch.cuda.Stream, torch.Tensor.type
before = state()
found = platform.install("auto")
assert state() == before
assert found.backend == "nccl" and found.device == torch.device("cuda", 3) and chosen == [found.device]
"""
    environment = {**os.environ, "LOCAL_RANK": "3"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_more_processes_than_gpus_are_refused_in_one_line(no_cuda: pytest.MonkeyPatch) -> None:
    def set_device(device: torch.device) -> None:
        raise RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might be reported later.")

    no_cuda.setattr(torch.cuda, "is_available", lambda: True)
    no_cuda.setattr(torch.cuda, "device_count", lambda: 2)
    no_cuda.setattr(torch.cuda, "set_device", set_device)
    no_cuda.setenv("LOCAL_RANK", "2")
    with pytest.raises(platform.PlatformError, match=r"LOCAL_RANK=2.*shows 2 GPUs") as raised:
        platform.install("cuda")
    assert "\n" not in str(raised.value)


def test_a_cpu_process_does_not_load_the_compiler_and_leaves_it_as_it_was() -> None:
    """Its import is 40% of a start, for decorators that a CPU run passes over."""
    script = """
import sys, torch
compiler = torch.compile
from emu3_megatron.parallel import platform
platform.install("cpu")
import megatron.core.models.gpt, megatron.core.optimizer, megatron.core.pipeline_parallel
assert "torch._dynamo" not in sys.modules and "torch._inductor" not in sys.modules
assert torch.compile is compiler
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("version", ["0.16.1", "0.17.1", "0.18.0rc2", "0.19.0"])
def test_a_missing_triton_is_named_where_megatron_core_imports_it(version: str) -> None:
    """torch's CPU builds do not bring it."""
    script = f"""
import importlib.metadata, sys
sys.modules["triton"] = None
importlib.metadata.version = lambda name: "{version}"
from emu3_megatron.parallel import platform
platform.REDIRECTIONS = ()
try:
    platform.install("cpu")
except platform.PlatformError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    if version < "0.18":
        assert not done.stdout
    else:
        assert f"megatron-core {version} imports Triton" in done.stdout
        assert "pip install triton" in done.stdout
        assert done.stdout.count("\n") == 1


def test_every_redirection_says_what_and_why() -> None:
    assert all(r.target and r.reason for r in platform.REDIRECTIONS)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fused_adam_equals_torch_adamw(weight_decay: float) -> None:
    torch.manual_seed(1)
    ours = [torch.nn.Parameter(torch.randn(7, 5)), torch.nn.Parameter(torch.randn(9))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    optimizers = FusedAdam(ours, **settings), torch.optim.AdamW(theirs, **settings)  # type: ignore[arg-type]
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert optimizers[0].param_groups[0]["step"] == 5


def test_fused_adam_state_survives_a_round_trip_with_one_step_count_a_group() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = FusedAdam(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones(3)
    optimizer.step()
    fresh = FusedAdam(parameters, lr=0.1)
    fresh.load_state_dict(optimizer.state_dict())
    fresh.step()
    assert fresh.param_groups[0]["step"] == 2
    assert set(fresh.state[parameters[0]]) == {"exp_avg", "exp_avg_sq"}
