"""Random numbers of dropout as a function of the step, so that a resume needs no random state.

`step_key` is what the dropout of hidden states is drawn from, and on a CPU that of attention: with the window
and the token it gives every mask, whatever the layout (`emu3_megatron.model.dropout`). Attention kernels of a
GPU, and adapters, draw from states, which `seed_step` sets for each rank.
"""

from __future__ import annotations

import hashlib

import torch


def step_key(seed: int, step: int) -> int:
    """64 bits that stand for seed and step."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:8], "little")


def seed_step(seed: int, step: int) -> None:
    """Seed every generator that dropout draws from, for one step.

    Ranks that hold other tokens or other layers draw other numbers; tensor-parallel ranks draw the same for
    what they hold in common and others for what they split (megatron-core's tracker keeps both).

    Args:
        seed: Seed of the run.
        step: The step about to be taken.
    """
    from megatron.core import parallel_state, tensor_parallel

    tokens_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    layers_rank = parallel_state.get_pipeline_model_parallel_rank()
    digest = hashlib.sha256(f"{seed}/{step}/{tokens_rank}/{layers_rank}".encode()).digest()
    # 31 bits: the tracker adds small offsets and CUDA takes 32.
    own = int.from_bytes(digest[:4], "little") >> 1
    torch.manual_seed(own)
    tensor_parallel.model_parallel_cuda_manual_seed(own)
