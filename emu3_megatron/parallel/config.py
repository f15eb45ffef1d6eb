"""How a model and its work are split over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from emu3_megatron.errors import UserError

ContextCommunication = Literal["auto", "all_gather", "a2a", "p2p"]


class LayoutError(UserError):
    """A layout that cannot work, or would work silently wrong; one line with value, rule and remedy."""


@dataclass(kw_only=True)
class ParallelConfig:
    """Degrees of parallelism. Data parallelism is what is left of the world."""

    tensor_model_parallel_size: int = 1
    """Processes that share every weight matrix."""
    pipeline_model_parallel_size: int = 1
    """Processes that share the layers."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Layer groups per pipeline process (interleaved schedule); None: one."""
    layers_in_last_stage: int | None = None
    """Layers of the last pipeline process, which computes the output layer besides: fewer than the others',
    which share the rest evenly; None: all have the same. Without interleaving only."""
    context_parallel_size: int = 1
    """Processes that share every document of a window."""
    sequence_parallel: bool = False
    """Split activations between tensor-parallel regions along the sequence; needs tensor parallelism."""
    cp_comm: ContextCommunication = "auto"
    """How ranks of context parallelism exchange keys and values: by all-gather, or by all-to-all over heads
    (`a2a`), both of the torch attention; from rank to rank (`p2p`), Transformer Engine's way with packed
    windows. `auto`: `p2p` with Transformer Engine, else `all_gather`."""

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model and one micro-batch."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    def context_communication(self, *, transformer_engine: bool) -> str:
        """What `cp_comm` comes to: ``all_gather``, ``a2a`` or ``p2p``.

        Args:
            transformer_engine: Whether attention is Transformer Engine's.

        Raises:
            LayoutError: that attention does not have it.
        """
        if self.cp_comm == "auto" or self.context_parallel_size == 1:
            return "p2p" if transformer_engine else "all_gather"
        if transformer_engine != (self.cp_comm == "p2p"):
            backend, has = (
                ("Transformer Engine", "p2p") if transformer_engine else ("torch", "all_gather and a2a")
            )
            raise LayoutError(
                f"parallel.cp_comm={self.cp_comm}: with packed windows the attention of {backend} takes only "
                f"{has}; set cp_comm to auto, or choose another model.attention_backend"
            )
        return self.cp_comm

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel degree in a world of `world_size` processes.

        Raises:
            LayoutError: the world cannot be divided.
        """
        if world_size % self.model_parallel_size:
            raise LayoutError(
                f"{world_size} processes cannot be divided by tensor x pipeline x context parallelism = "
                f"{self.tensor_model_parallel_size} x {self.pipeline_model_parallel_size} x "
                f"{self.context_parallel_size} = {self.model_parallel_size}; start a multiple of it"
            )
        return world_size // self.model_parallel_size

    def stage_layers(self, num_layers: int) -> list[int]:
        """Layers of every pipeline process, first to last.

        Raises:
            LayoutError: they cannot be divided.
        """
        stages = self.pipeline_model_parallel_size
        last = self.layers_in_last_stage
        if last is None:
            groups = stages * (self.virtual_pipeline_model_parallel_size or 1)
            if num_layers % groups:
                raise LayoutError(
                    f"model.num_layers={num_layers} is not divisible by the {groups} pipeline stages; "
                    "change pipeline_model_parallel_size or virtual_pipeline_model_parallel_size"
                )
            return [num_layers // stages] * stages
        if not 0 < last < num_layers or (num_layers - last) % (stages - 1):
            raise LayoutError(
                f"parallel.layers_in_last_stage={last} leaves {num_layers - last} of model.num_layers="
                f"{num_layers} to {stages - 1} other stages; it must leave each the same whole number"
            )
        return [(num_layers - last) // (stages - 1)] * (stages - 1) + [last]

    def validate(self) -> None:
        """Refuse degrees that cannot work.

        Raises:
            LayoutError: the first rule that is broken.
        """
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
            if getattr(self, name) < 1:
                raise LayoutError(f"parallel.{name}={getattr(self, name)} must be at least 1")
        if self.cp_comm not in ("auto", "all_gather", "a2a", "p2p"):
            raise LayoutError(f"parallel.cp_comm={self.cp_comm!r} must be auto, all_gather, a2a or p2p")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise LayoutError(
                "parallel.sequence_parallel=true needs tensor_model_parallel_size > 1; set it to false"
            )
        virtual = self.virtual_pipeline_model_parallel_size
        if self.layers_in_last_stage is not None and (virtual or self.pipeline_model_parallel_size < 2):
            raise LayoutError(
                f"parallel.layers_in_last_stage={self.layers_in_last_stage} needs "
                "pipeline_model_parallel_size >= 2 and no virtual stages; leave it null"
            )
        if virtual is not None and (virtual < 2 or self.pipeline_model_parallel_size < 2):
            raise LayoutError(
                f"parallel.virtual_pipeline_model_parallel_size={virtual} must be at least 2 and needs "
                f"pipeline_model_parallel_size >= 2, not {self.pipeline_model_parallel_size}; leave it null"
            )
