"""One step of preference training under layouts of two processes; rank 0 writes what came out as JSON.

Usage: torchrun --nproc-per-node 2 layouts_worker.py OUTPUT PAIRS. Every layout is held against both processes
doing all the work, each with half the weight: what a single process computes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from emu3_megatron.parallel import platform

PLATFORM = platform.install("cpu")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from emu3_megatron.data import Mixture, Source  # noqa: E402
from emu3_megatron.data.loader import Batch  # noqa: E402
from emu3_megatron.model import LoRAConfig, build_model  # noqa: E402
from emu3_megatron.model.lora import adapters, add_adapters  # noqa: E402
from emu3_megatron.parallel.config import ParallelConfig  # noqa: E402
from emu3_megatron.parallel.groups import initialize_parallel  # noqa: E402
from emu3_megatron.posttraining.preferences.config import DPOConfig  # noqa: E402
from emu3_megatron.posttraining.preferences.objective import DPO  # noqa: E402
from emu3_megatron.posttraining.preferences.pairs import PairPlan, PairTemplate  # noqa: E402
from emu3_megatron.posttraining.preferences.references import ReferenceModel  # noqa: E402
from emu3_megatron.training.config import LossConfig, OptimizerConfig  # noqa: E402
from emu3_megatron.training.metrics import MetricsLayout  # noqa: E402
from emu3_megatron.training.optimizer import wrap_for_data_parallelism  # noqa: E402
from emu3_megatron.training.step import ForwardBackward, Groups  # noqa: E402
from tests.inference import worlds  # noqa: E402
from tests.parallel.layouts_worker import data_rank, largest_difference, whole  # noqa: E402

LAYOUTS = {
    "dp2": ParallelConfig(),
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "tp2-sp": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
    "pp2-interleaved": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "cp2": ParallelConfig(context_parallel_size=2),
    "cp2-a2a": ParallelConfig(context_parallel_size=2, cp_comm="a2a"),
}
ADAPTERS = {"whole": LoRAConfig(), "adapters": LoRAConfig(rank=3, alpha=4.0)}
CONFIG = DPOConfig(
    beta=0.05,
    label_smoothing=0.1,
    cross_entropy_weight=0.5,
    length_normalization=False,
    counted=["vision", "break"],
)
WINDOWS = 4


def batches_of(pairs: Path) -> list[Batch]:
    """Micro-batches of a window each."""
    mixture = Mixture([Source(path=str(pairs), template=PairTemplate(alignment=4))])
    plan = PairPlan(mixture, seed=1, context_length=160, alignment=4, block_draws=8)
    return [Batch.collate([plan.window(number)]) for number in range(WINDOWS)]


def build(layout: ParallelConfig, seed: int) -> list[Any]:
    return build_model(
        worlds.model_config(num_layers=4),
        vocabulary_padded_size=worlds.VOCABULARY.padded_size,
        vocabulary_size=worlds.VOCABULARY.size,
        parallel=layout,
        seed=seed,
        precision="fp32",
    )


def run(layout: ParallelConfig, lora: LoRAConfig, batches: list[Batch]) -> dict[str, Any]:
    """Numbers and whole gradients of one step."""
    initialize_parallel(layout, PLATFORM, seed=1)
    policy, reference = build(layout, 0), build(layout, 1)
    for chunk in policy if lora.rank else ():
        add_adapters(chunk, lora, seed=2)
        for _, _, adapter in adapters(chunk):
            torch.nn.init.constant_(adapter.lora_B, 0.05)
    chunks = wrap_for_data_parallelism(policy, OptimizerConfig(use_distributed_optimizer=False))
    for chunk in reference:
        chunk.eval()
    device = torch.device("cpu")
    asked = ReferenceModel(reference, ("pairs",), 16, device)
    objective = DPO(CONFIG, LossConfig(prompt_weight=0.5, chunk_size=16), asked, Groups.current())
    metrics = MetricsLayout(("pairs",), objective.quantities)
    vector = metrics.vector(*ForwardBackward(chunks, objective, metrics, device=device)(batches))
    dist.all_reduce(vector)
    totals = metrics.totals(vector)
    named = {"loss": objective.value(totals), **objective.named(totals)}
    for chunk in policy:
        for parameter in chunk.parameters():
            if not parameter.requires_grad:
                parameter.main_grad = torch.zeros_like(parameter)
    gradients = whole(policy, lambda parameter: parameter.main_grad)
    parallel_state.destroy_model_parallel()
    return {"named": named, "gradients": gradients}


def main() -> None:
    """Every layout, with and without adapters."""
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    batches = batches_of(Path(sys.argv[2]))
    results = {}
    for kind, lora in ADAPTERS.items():
        want = run(ParallelConfig(), lora, batches)
        for name, layout in LAYOUTS.items():
            ranks = layout.data_parallel_size(2)
            share = len(batches) // ranks
            rank = data_rank(layout, 2)
            got = run(layout, lora, batches[rank * share : (rank + 1) * share])
            results[f"{name} {kind}"] = {
                "gradients": largest_difference(got["gradients"], want["gradients"]),
                "largest gradient": max(float(each.norm()) for each in want["gradients"].values()),
                "named": got["named"],
                "expected": want["named"],
            }
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
