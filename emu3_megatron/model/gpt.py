"""The decoder: megatron-core's GPTModel that returns hidden states, losses or logits."""

from __future__ import annotations

from typing import Any, Literal

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams

from emu3_megatron.model.cache import KeyValueCache
from emu3_megatron.model.layers import OutputLayer
from emu3_megatron.model.loss import TokenLosses, WeightedLoss
from emu3_megatron.model.packing import LayoutParameters, window_layout


class Emu3Model(GPTModel):
    """One pipeline chunk of the decoder.

    In training it is called with a packed window and gives the hidden states (the pipeline's tensor before
    the last stage); `token_losses` or `weighted_loss` turn those into losses without whole logits. For
    generation it is called with a `KeyValueCache`, or with ``logits=`` on a packed window.

    Args:
        model_config: The shape of the model.
        vocabulary_size: Ids in use; the rest of ``vocab_size`` is padding.
        transformer_engine: Whether the layers are Transformer Engine's.
        kwargs: Arguments of `GPTModel`.
    """

    def __init__(
        self, *, model_config: Any, vocabulary_size: int, transformer_engine: bool, **kwargs: Any
    ) -> None:
        kwargs["position_embedding_type"] = "rope" if transformer_engine else "none"
        super().__init__(**kwargs)
        self.model_config = model_config
        self.vocabulary_size = vocabulary_size
        self.transformer_engine = transformer_engine
        if self.pre_process:
            self.embedding.embedding_dropout.p = model_config.embedding_dropout
        if self.post_process:
            self.output_layer = OutputLayer(
                self.config.hidden_size,
                self.vocab_size,
                config=self.config,
                init_method=self.config.init_method,
                bias=False,
                gather_output=False,
                tp_group=self.pg_collection.tp,
            )

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context: KeyValueCache | None = None,
        logits: Literal["none", "all", "last"] = "none",
    ) -> torch.Tensor:
        """Run the chunk.

        Args:
            input_ids: int64 ``[1, T / cp]`` in training, ``[B, S]`` with a cache.
            position_ids: Ignored; positions count from each document's start.
            attention_mask: Ignored; documents come from `packed_seq_params`.
            packed_seq_params: The full window, see `packed_sequence_parameters`; needed without a cache.
            inference_context: Cache for generation; the caller advances it.
            logits: What the last stage returns: hidden states, all logits, or those of the last token.

        Returns:
            Hidden states ``[T / cp, 1, hidden]`` (split over the tensor-parallel group under sequence
            parallelism), or fp32 logits ``[B, S or 1, vocabulary_size]`` without padding ids.

        Raises:
            ValueError: neither a packed window nor a cache is given, or generation is asked of a layout that
                splits the sequence.
        """
        if inference_context is not None or logits == "last":
            self._refuse_split_sequence()
        hidden = self.embedding(input_ids=input_ids, position_ids=None) if self.pre_process else None
        rotary = None
        if inference_context is None:
            if packed_seq_params is None:
                raise ValueError("the model needs packed_seq_params (a packed window) or a KeyValueCache")
            if self.transformer_engine:
                rotary = self.rotary_pos_emb(packed_seq_params.max_seqlen_q, packed_seq=True)
            else:
                packed_seq_params = self._with_layout(packed_seq_params, input_ids.device)
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            inference_context=inference_context,
            rotary_pos_emb=rotary,
            packed_seq_params=packed_seq_params,
        )
        if not self.post_process or logits == "none":
            return hidden
        return self.logits(hidden[-1:] if logits == "last" else hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 logits ``[B, S, vocabulary_size]`` of hidden states ``[S, B, hidden]``, on every rank."""
        out, _ = self.output_layer(hidden)
        out = tensor_parallel.gather_from_tensor_model_parallel_region(out, group=self.pg_collection.tp)
        return out[..., : self.vocabulary_size].transpose(0, 1).float()

    def token_losses(
        self, hidden: torch.Tensor, labels: torch.Tensor, *, chunk_size: int | None = None
    ) -> TokenLosses:
        """Per-token losses of the last stage, see `vocabulary_parallel_linear_cross_entropy`."""
        return self.output_layer(
            hidden, labels=labels, vocabulary_size=self.vocabulary_size, chunk_size=chunk_size
        )

    def weighted_loss(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        *,
        chunk_size: int | None = None,
    ) -> WeightedLoss:
        """Weighted sum of the losses of the last stage, see `weighted_linear_cross_entropy`."""
        return self.output_layer(
            hidden,
            labels=labels,
            weights=weights,
            vocabulary_size=self.vocabulary_size,
            chunk_size=chunk_size,
        )

    def new_cache(
        self, *, batch: int, max_length: int, left_padding: torch.Tensor | None = None
    ) -> KeyValueCache:
        """An empty cache for this chunk's shape; one cache may serve all chunks of a rank."""
        parameter = next(self.parameters())
        return KeyValueCache(
            batch=batch,
            max_length=max_length,
            groups=self.config.num_query_groups // self.config.tensor_model_parallel_size,
            channels=self.config.kv_channels,
            dtype=parameter.dtype,
            device=parameter.device,
            left_padding=left_padding,
        )

    def _refuse_split_sequence(self) -> None:
        if self.config.sequence_parallel or self.config.context_parallel_size > 1:
            raise ValueError(
                "generation needs whole sequences, but "
                f"sequence_parallel={self.config.sequence_parallel} and "
                f"context_parallel_size={self.config.context_parallel_size}; build the model without them"
            )

    def _with_layout(self, parameters: PackedSeqParams, device: torch.device) -> LayoutParameters:
        if isinstance(parameters, LayoutParameters):
            return parameters
        group = self.pg_collection.cp
        layout = window_layout(
            parameters.cu_seqlens_q,
            cp_size=group.size(),
            cp_rank=group.rank(),
            all_to_all=self.config.cp_comm_type == "a2a",
            device=device,
        )
        return LayoutParameters.attach(parameters, layout)
