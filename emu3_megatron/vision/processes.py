"""What the processes of a vision training say to each other; with one process, nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from emu3_megatron import processes
from emu3_megatron.errors import UserError


def set_up_processes() -> torch.device:
    """Join torchrun's process group where there is one; give the device of this process.

    Raises:
        UserError: there are more processes than GPUs.
    """
    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local >= torch.cuda.device_count():
        raise UserError(
            f"process {local} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
            "start no more processes than GPUs (torchrun --nproc-per-node)"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        processes.join("nccl" if cuda else "gloo")
    if cuda:
        torch.cuda.set_device(local)
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def world_size() -> int:
    """Number of processes; 1 where none were set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 where none were set up."""
    return dist.get_rank() if world_size() > 1 else 0


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, one after the other; all have the same shape."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def averaged(values: Tensor) -> Tensor:
    """Mean over the processes."""
    if world_size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def summed(values: Tensor) -> Tensor:
    """Sum over the processes."""
    if world_size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def take_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with those of the first process: kernels of a GPU may round differently on each."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes; a missing one counts as 0."""
    if world_size() == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for parameter, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = part.view(parameter.shape)
