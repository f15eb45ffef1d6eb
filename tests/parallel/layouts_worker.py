"""One training step under many layouts in one torchrun launch; rank 0 writes what came out as JSON.

Usage: torchrun --nproc-per-node N layouts_worker.py OUTPUT. Each layout is compared with all data on one
process: every rank first runs the layout of degree 1 on its own, as the reference.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from emu3_megatron.parallel import platform

warnings.filterwarnings("ignore")
PLATFORM = platform.install("cpu")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

from emu3_megatron.model import ModelConfig, build_model  # noqa: E402
from emu3_megatron.model.initialization import global_parameter_names  # noqa: E402
from emu3_megatron.parallel.config import ParallelConfig  # noqa: E402
from emu3_megatron.parallel.context import (  # noqa: E402
    packed_sequence_parameters,
    split_batch_for_context_parallel,
)
from emu3_megatron.parallel.groups import initialize_parallel  # noqa: E402

WINDOW, MICRO_BATCHES, IN_USE, PADDED = 96, 4, 979, 1024
DOCUMENTS = ([16, 16, 40, 24], [40, 8, 48], [96], [8] * 12)


@dataclass(kw_only=True)
class Case:
    """A layout, the model's variant, and what is wrapped around it."""

    name: str
    layout: ParallelConfig
    qk_layernorm: bool = False
    distributed_optimizer: bool = False
    precision: str = "fp32"


def cases(world: int) -> list[Case]:
    """The layouts of a launch of 2 or 4 processes."""

    def case(
        name: str,
        *,
        qk_layernorm: bool = False,
        distributed_optimizer: bool = False,
        precision: str = "fp32",
        **degrees: Any,
    ) -> Case:
        names = {
            "tp": "tensor_model",
            "pp": "pipeline_model",
            "cp": "context",
            "vpp": "virtual_pipeline_model",
        }
        fields = {f"{names[k]}_parallel_size" if k in names else k: v for k, v in degrees.items()}
        return Case(
            name=name,
            layout=ParallelConfig(**fields),
            qk_layernorm=qk_layernorm,
            distributed_optimizer=distributed_optimizer,
            precision=precision,
        )

    if world == 2:
        return [
            case("TP2", tp=2),
            case("TP2 SP", tp=2, sequence_parallel=True),
            case("TP2 SP QK-norm", tp=2, sequence_parallel=True, qk_layernorm=True),
            case("TP2 QK-norm", tp=2, qk_layernorm=True),
            case("PP2", pp=2),
            case("PP2 interleaved", pp=2, vpp=2),
            case("CP2 all-gather", cp=2),
            case("CP2 all-to-all", cp=2, cp_comm="a2a"),
            case("CP2 QK-norm", cp=2, qk_layernorm=True),
            case("DP2"),
            case("DP2 distributed optimizer", distributed_optimizer=True),
            case("TP2 SP distributed optimizer", tp=2, sequence_parallel=True, distributed_optimizer=True),
            case("TP2 bf16", tp=2, precision="bf16"),
            case("DP2 bf16 distributed optimizer", precision="bf16", distributed_optimizer=True),
        ]
    return [
        case("TP2 CP2", tp=2, cp=2),
        case("TP2 SP CP2 all-to-all", tp=2, cp=2, sequence_parallel=True, cp_comm="a2a"),
        case("PP2 TP2 SP", pp=2, tp=2, sequence_parallel=True),
        case("PP2 CP2", pp=2, cp=2),
        case("CP2 DP2 distributed optimizer", cp=2, distributed_optimizer=True),
        case("CP4 all-gather", cp=4),
        case("CP4 all-to-all", cp=4, cp_comm="a2a"),
        case("TP4 SP", tp=4, sequence_parallel=True),
        case("PP4", pp=4),
        case("DP4"),
    ]


def window(number: int, scale: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Micro-batch `number`: tensors ``[1, WINDOW]`` and cumulative lengths; its weights times `scale`."""
    generator = torch.Generator().manual_seed(number)
    tokens, labels = torch.randint(0, IN_USE, (2, 1, WINDOW), generator=generator)
    weights = torch.rand(1, WINDOW, generator=generator) * (scale / (WINDOW * MICRO_BATCHES))
    cu = torch.tensor([0, *DOCUMENTS[number]]).cumsum(0).to(torch.int32)
    return {"tokens": tokens, "labels": labels, "weights": weights}, cu


def forward_step(
    data: Iterator[int], model: Any, *, scale: float
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """The schedule's callback."""
    batch, cu = window(next(data), scale)
    batch = split_batch_for_context_parallel(batch, cu, parallel_state.get_context_parallel_group())
    output = model(batch["tokens"], None, None, packed_seq_params=packed_sequence_parameters(cu))

    def loss(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        total = model.module.weighted_loss(hidden, batch["labels"], batch["weights"], chunk_size=40).total
        return total, torch.tensor(1, dtype=torch.int), {"loss": total.detach()}

    return output, loss


def run(case: Case, windows: list[int], scale: float = 1.0) -> dict[str, Any]:
    """Forward, backward and one optimizer step; whole gradients and new weights by global name.

    Adam's epsilon is large, so that a gradient near zero does not turn rounding into a full step.
    """
    initialize_parallel(case.layout, PLATFORM, seed=1)
    config = ModelConfig.preset(
        "tiny",
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=8,
        num_query_groups=4,
        qk_layernorm=case.qk_layernorm,
    )
    chunks = build_model(
        config,
        vocabulary_padded_size=PADDED,
        vocabulary_size=IN_USE,
        parallel=case.layout,
        seed=1,
        precision=case.precision,
    )
    transformer = chunks[0].config
    wrapping = DistributedDataParallelConfig(
        use_distributed_optimizer=case.distributed_optimizer, grad_reduce_in_fp32=True
    )
    model = [DistributedDataParallel(transformer, wrapping, chunk) for chunk in chunks]
    settings = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        adam_eps=1e-2,
        clip_grad=1.0,
        bf16=case.precision == "bf16",
        params_dtype=transformer.params_dtype,
        use_distributed_optimizer=case.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(settings, model)
    # The weights are normalised already: no division by a number of tokens.
    transformer.finalize_model_grads_func = lambda model, num_tokens=None, **rest: finalize_model_grads(
        model, None, **rest
    )
    reports = get_forward_backward_func()(
        forward_step_func=functools.partial(forward_step, scale=scale),
        data_iterator=[iter(windows) for _ in model],
        model=model,
        num_microbatches=len(windows),
        seq_length=WINDOW,
        micro_batch_size=1,
        forward_only=False,
    )
    loss = torch.stack([report["loss"] for report in reports]).sum() if reports else torch.zeros(())
    dist.all_reduce(loss, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(loss, last, group=parallel_state.get_pipeline_model_parallel_group())
    gradients = {} if case.distributed_optimizer else whole(chunks, lambda p: p.main_grad)
    _, norm, _ = optimizer.step()
    weights = whole(chunks, lambda p: p.detach().float())
    parallel_state.destroy_model_parallel()
    return {"loss": loss.item(), "norm": float(norm), "gradients": gradients, "weights": weights}


def whole(chunks: list[Any], value: Callable[[Any], torch.Tensor]) -> dict[str, torch.Tensor]:
    """A tensor of every parameter of the model, joined over tensor and pipeline parallelism."""
    group = parallel_state.get_tensor_model_parallel_group()
    mine = {}
    for chunk in chunks:
        for name, parameter in global_parameter_names(chunk):
            part = value(parameter).clone()
            if group.size() > 1 and getattr(parameter, "tensor_model_parallel", False):
                parts = [torch.empty_like(part) for _ in range(group.size())]
                dist.all_gather(parts, part, group=group)
                if "linear_fc1" in name:
                    parts = [p.chunk(2)[half] for half in range(2) for p in parts]
                part = torch.cat(parts, parameter.partition_dim)
            mine[name] = part
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {name: tensor for part in everyone for name, tensor in part.items()}


def largest_difference(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """Largest relative difference (Frobenius) of any tensor; infinite when names differ."""
    if not got:
        return 0.0
    if set(got) != set(want):
        return float("inf")
    return max(((got[n] - want[n]).norm() / want[n].norm().clamp(min=1e-12)).item() for n in want)


def main() -> None:
    """Run all cases of this world size."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    everything = list(range(MICRO_BATCHES))
    calls = record_calls_that_need_cuda()
    references: dict[tuple[bool, str], dict[str, Any]] = {}
    results = []
    for case in cases(world):
        variant = (case.qk_layernorm, case.precision)
        if variant not in references:
            # Every rank works on all windows with 1/world of the weight: the sum over ranks is one process's.
            single = Case(
                name="one process",
                layout=ParallelConfig(),
                qk_layernorm=case.qk_layernorm,
                precision=case.precision,
            )
            references[variant] = run(single, everything, scale=1 / world)
        want = references[variant]
        data = case.layout.data_parallel_size(world)
        rank = data_rank(case.layout, world)
        share = len(everything) // data
        got = run(case, everything[rank * share : (rank + 1) * share])
        results.append(
            {
                "name": case.name,
                "layout": asdict(case.layout),
                "loss": abs(got["loss"] - want["loss"]) / want["loss"],
                "norm": abs(got["norm"] - want["norm"]) / want["norm"],
                "gradients": largest_difference(got["gradients"], want["gradients"]),
                "weights": largest_difference(got["weights"], want["weights"]),
            }
        )
    dropout = dropout_draws() if world == 2 else {}
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump({"cases": results, "dropout": dropout, "calls": calls}, file)
    dist.barrier()
    dist.destroy_process_group()


def record_calls_that_need_cuda() -> list[str]:
    """Where torch is asked for a GPU although the platform is the CPU; a list that grows."""
    calls: list[str] = []

    def refuse() -> None:
        calls.append("".join(traceback.format_stack(limit=6)))
        raise RuntimeError("a call that needs CUDA was not redirected")

    torch.cuda._lazy_init = refuse
    return calls


def dropout_draws() -> dict[str, bool]:
    """Whether two ranks' hidden states agree in training with dropout, by how they are related."""
    config = ModelConfig.preset(
        "tiny", embedding_dropout=0.1, attention_dropout=0.1, hidden_dropout=0.1, num_query_groups=4
    )
    batch, cu = window(0, 1.0)
    equal = {}
    for name, layout in {
        "tensor": ParallelConfig(tensor_model_parallel_size=2),
        "data": ParallelConfig(),
    }.items():
        initialize_parallel(layout, PLATFORM, seed=1)
        (model,) = build_model(
            config, vocabulary_padded_size=PADDED, vocabulary_size=IN_USE, parallel=layout, seed=1
        )
        hidden = model(batch["tokens"], packed_seq_params=packed_sequence_parameters(cu)).detach()
        both = [torch.empty_like(hidden) for _ in range(2)]
        dist.all_gather(both, hidden)
        equal[name] = torch.equal(*both)
        parallel_state.destroy_model_parallel()
    return equal


def data_rank(layout: ParallelConfig, world: int) -> int:
    """Data-parallel rank under megatron-core's order tp-cp-dp-pp."""
    inner = layout.tensor_model_parallel_size * layout.context_parallel_size
    return dist.get_rank() // inner % layout.data_parallel_size(world)


if __name__ == "__main__":
    main()
