"""Logits of an imported run under a layout, written by the last stage's first rank.

    torchrun --nproc-per-node N tests/conversion/forward.py CHECKPOINT IDS OUTPUT TP PP

IDS is a safetensors file with ``ids [1, N]``; OUTPUT gets ``logits [N, V]``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    """Load, run the stages one after another, write."""
    from megatron.core import parallel_state

    from emu3_megatron.parallel import platform
    from emu3_megatron.parallel.config import ParallelConfig
    from emu3_megatron.parallel.context import packed_sequence_parameters
    from emu3_megatron.parallel.groups import destroy_parallel, initialize_parallel
    from emu3_megatron.training.checkpoint import load_model_for_inference

    torch.set_num_threads(1)
    checkpoint, ids_file, output = map(Path, sys.argv[1:4])
    parallel = ParallelConfig(
        tensor_model_parallel_size=int(sys.argv[4]), pipeline_model_parallel_size=int(sys.argv[5])
    )
    initialize_parallel(parallel, platform.install("cpu"), seed=0)
    (model,), config, vocabulary = load_model_for_inference(checkpoint, parallel)
    ids = load_file(ids_file)["ids"]
    length = ids.shape[1]
    packed = packed_sequence_parameters(torch.tensor([0, length], dtype=torch.int32))
    stage = parallel_state.get_pipeline_model_parallel_rank()
    stages = parallel.pipeline_model_parallel_size
    group = parallel_state.get_pipeline_model_parallel_group()
    hidden = torch.empty(length, 1, config.hidden_size)
    with torch.no_grad():
        if stage > 0:
            torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank(), group)
            model.set_input_tensor(hidden)
        result = model(ids, packed_seq_params=packed, logits="all")
        if stage < stages - 1:
            following = parallel_state.get_pipeline_model_parallel_next_rank()
            torch.distributed.send(result.contiguous(), following, group)
        elif parallel_state.get_tensor_model_parallel_rank() == 0:
            save_file({"logits": result[0, :, : vocabulary.size].contiguous()}, output)
    torch.distributed.barrier()
    destroy_parallel()


if __name__ == "__main__":
    main()
