"""The decoder: megatron-core's GPTModel that returns hidden states, losses or logits."""

from __future__ import annotations

from typing import Any, Literal

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams

from emu3_megatron.model.dropout import TokenDropout, TokenNumbers
from emu3_megatron.model.layers import OutputLayer
from emu3_megatron.model.loss import TokenLosses, WeightedLoss
from emu3_megatron.model.packing import LayoutParameters, window_layout


class Emu3Model(GPTModel):
    """One pipeline chunk of the decoder.

    In training it is called with a packed window and gives the hidden states (the pipeline's tensor before
    the last stage); `token_losses` or `weighted_loss` turn those into losses without whole logits. Generation
    runs its modules with a key-value cache: `emu3_megatron.inference.decoder`.

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
        self._drop_by_token()
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
        host_cu_seqlens: torch.Tensor | None = None,
        dropout: TokenNumbers | None = None,
        logits: Literal["none", "all"] = "none",
    ) -> torch.Tensor:
        """Run the chunk.

        Args:
            input_ids: int64 ``[1, T / cp]``.
            position_ids: Ignored; positions count from each document's start.
            attention_mask: Ignored; documents come from `packed_seq_params`.
            packed_seq_params: The full window, see `packed_sequence_parameters`.
            host_cu_seqlens: The window's document lengths on the CPU; spares the torch attention to fetch
                them from a GPU.
            dropout: Random numbers of the tokens, from which dropout is drawn; None: from torch's state.
            logits: What the last stage returns: hidden states or all logits.

        Returns:
            Hidden states ``[T / cp, 1, hidden]`` (split over the tensor-parallel group under sequence
            parallelism), or fp32 logits ``[1, T / cp, vocabulary_size]`` without padding ids.

        Raises:
            ValueError: no packed window is given.
        """
        if packed_seq_params is None:
            raise ValueError("the model needs packed_seq_params, a packed window")
        hidden = None
        if self.pre_process:
            self.embedding.embedding_dropout.tokens = dropout.share if dropout else None
            hidden = self.embedding(input_ids=input_ids, position_ids=None)
        rotary = None
        if self.transformer_engine:
            rotary = self.rotary_pos_emb(packed_seq_params.max_seqlen_q, packed_seq=True)
        else:
            packed_seq_params = self._with_layout(
                packed_seq_params, host_cu_seqlens, input_ids.device, dropout
            )
        packed_seq_params.dropout = dropout
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=rotary,
            packed_seq_params=packed_seq_params,
        )
        return self.logits(hidden) if self.post_process and logits == "all" else hidden

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
        z_loss: float = 0.0,
    ) -> WeightedLoss:
        """Weighted sum of the losses of the last stage, see `weighted_linear_cross_entropy`.

        Differentiate `total` itself: the gradient of a large output layer is added to megatron-core's buffer
        in forward (`loss.LEAST_FUSED_WEIGHTS`).
        """
        return self.output_layer(
            hidden,
            labels=labels,
            weights=weights,
            vocabulary_size=self.vocabulary_size,
            chunk_size=chunk_size,
            z_loss=z_loss,
        )

    def _drop_by_token(self) -> None:
        """Give all places of hidden dropout masks that belong to tokens."""
        shape, group = self.model_config, self.pg_collection.tp if self.config.sequence_parallel else None
        if self.pre_process:
            self.embedding.embedding_dropout = TokenDropout("embedding", shape.embedding_dropout, group)
        if not shape.hidden_dropout:
            return
        for layer in self.decoder.layers:
            for place, sum_with in (("attention", "self_attn_bda"), ("feed-forward", "mlp_bda")):
                dropout = TokenDropout(f"{place} output {layer.layer_number}", shape.hidden_dropout, group)
                layer.add_module(f"{sum_with}_dropout", dropout)
                setattr(layer, sum_with, dropout.add)
            layer.register_forward_pre_hook(_numbers_to_dropout, with_kwargs=True)

    def _with_layout(
        self,
        parameters: PackedSeqParams,
        host_cu_seqlens: torch.Tensor | None,
        device: torch.device,
        dropout: TokenNumbers | None,
    ) -> LayoutParameters:
        if isinstance(parameters, LayoutParameters):
            return parameters
        group = self.pg_collection.cp
        layout = window_layout(
            parameters.cu_seqlens_q if host_cu_seqlens is None else host_cu_seqlens,
            cp_size=group.size(),
            cp_rank=group.rank(),
            all_to_all=self.config.cp_comm_type == "a2a",
            device=device,
            numbers=dropout.whole if dropout and self.model_config.attention_dropout else None,
        )
        return LayoutParameters.attach(parameters, layout)


def _numbers_to_dropout(layer: Any, _args: Any, kwargs: dict[str, Any]) -> None:
    """Before a layer runs, or is run again: what its dropout draws from."""
    numbers = getattr(kwargs.get("packed_seq_params"), "dropout", None)
    layer.self_attn_bda_dropout.tokens = layer.mlp_bda_dropout.tokens = numbers.share if numbers else None
