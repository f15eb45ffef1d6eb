"""What a model loses on every token of a window, for people to look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from emu3_megatron.data import Window
from emu3_megatron.data.loader import Batch
from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Modality
from emu3_megatron.parallel import platform
from emu3_megatron.parallel.config import ParallelConfig
from emu3_megatron.parallel.context import packed_sequence_parameters
from emu3_megatron.parallel.groups import initialize_parallel
from emu3_megatron.training.checkpoint import load_model_for_inference
from emu3_megatron.training.step import attention_borders
from emu3_megatron.vocabulary import Vocabulary

WindowLosses = Callable[[Window], npt.NDArray[np.float32]]
"""fp32 ``[S]``: -log p of every token of a window, given those before it; NaN where nothing predicts it."""


def open_token_losses(
    checkpoint: Path,
    vocabulary: Vocabulary,
    *,
    attention: Literal["document", "window"] = "document",
    platform_name: platform.PlatformName = "auto",
) -> WindowLosses:
    """Load a model on this process and measure windows with it, without dropout.

    Args:
        checkpoint: A run, or one of its checkpoints.
        vocabulary: Of the windows.
        attention: What a token may look back at, see `DataConfig.attention`.
        platform_name: Where to compute.

    Raises:
        UserError: there is no checkpoint, or it has another vocabulary.
    """
    machine = platform.install(platform_name)
    initialize_parallel(ParallelConfig(), machine, seed=0)
    (model,), _, own = load_model_for_inference(checkpoint)
    if own != vocabulary:
        raise UserError(
            f"{checkpoint} was trained with vocabulary {own.name!r} ({own.size} ids), the windows have "
            f"{vocabulary.name!r} ({vocabulary.size}); give a checkpoint of the same vocabulary"
        )

    def losses(window: Window) -> npt.NDArray[np.float32]:
        batch = Batch.collate([window])
        whole = batch.tokens.numel() if attention == "window" else None
        borders, longest = attention_borders(batch, whole)
        with torch.no_grad():
            hidden = model(
                batch.tokens.to(machine.device),
                packed_seq_params=packed_sequence_parameters(borders.to(machine.device), longest),
                host_cu_seqlens=borders,
            )
            of_labels = model.token_losses(hidden, batch.labels.to(machine.device)).losses
        values = of_labels.float().cpu().numpy()
        values[window.modality == Modality.PADDING] = np.nan
        return np.concatenate([np.full(1, np.nan, np.float32), values[:-1]])

    return losses
