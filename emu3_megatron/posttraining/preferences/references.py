"""What the reference model says of every answer: asked once and kept, or at every step.

A cache is one file a source, ``NAME.npz``: float64 ``[pairs, 2, C]``, the sum of log-probabilities of each
class of token over the chosen and the rejected answer (so a change of the counted classes needs no new
answers), and the identity of what was asked about what. A file of another checkpoint or other pairs is
refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from emu3_megatron.data import MultimodalDataset
from emu3_megatron.data.loader import Batch, WindowLoader
from emu3_megatron.errors import UserError
from emu3_megatron.files import atomic_write
from emu3_megatron.parallel.platform import Platform
from emu3_megatron.posttraining.preferences.config import PreferenceTrainingConfig
from emu3_megatron.posttraining.preferences.objective import SEQUENCE, Answers
from emu3_megatron.posttraining.preferences.windows import every_pair, pair_template
from emu3_megatron.training import checkpoint_files
from emu3_megatron.training.checkpoint import load_model_for_inference
from emu3_megatron.training.checkpoint_choice import sound_checkpoint
from emu3_megatron.training.config import SourceConfig
from emu3_megatron.training.metrics import CLASSES, MetricsLayout, Totals
from emu3_megatron.training.modules import is_rank_zero
from emu3_megatron.training.objective import Loss, MicroBatch, Prepared
from emu3_megatron.training.step import ForwardBackward, Groups
from emu3_megatron.vocabulary import Vocabulary

CACHE_VERSION = 1
"""Raised whenever the same question would have another answer."""

NUMBER, ANSWERS = "number", "answers"

logger = logging.getLogger(__name__)

Values = npt.NDArray[np.float64]


class ReferenceModel:
    """The reference in memory, in the layout of the run.

    Args:
        chunks: Its pipeline chunks on this rank, in evaluation mode.
        sources: Names of the sources of the windows it will be asked about.
        chunk_size: Tokens whose logits exist at a time, see `LossConfig`.
        device: Where it is.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        sources: Sequence[str],
        chunk_size: int | None,
        device: torch.device,
    ) -> None:
        self._groups = Groups.current()
        self._sums = _AnswerSums(chunk_size)
        self._run = ForwardBackward(chunks, self._sums, MetricsLayout(tuple(sources)), device=device)

    def __call__(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """See `Reference`; zeros on all pipeline stages but the last."""
        with torch.no_grad():
            self._run(batches, forward_only=True)
        answers = []
        for number, batch in enumerate(batches):
            sums_RC = self._sums.found.pop(number, None)
            if sums_RC is None:
                sums_RC = torch.zeros(Answers.of(batch).count, len(CLASSES), dtype=torch.float64)
            elif self._groups.context.size() > 1:
                torch.distributed.all_reduce(sums_RC, group=self._groups.context)
            answers.append(sums_RC.cpu())
        return answers


class _AnswerSums:
    """An objective that only measures: log-probabilities by answer and class, kept by micro-batch."""

    quantities: tuple[str, ...] = ()

    def __init__(self, chunk_size: int | None) -> None:
        self._chunk_size = chunk_size
        self.found: dict[int, torch.Tensor] = {}
        """Number of the micro-batch -> float64 ``[R, C]`` of this rank's tokens."""

    def denominators(self, batches: Sequence[Batch]) -> torch.Tensor:
        """None is needed."""
        return torch.ones(1, dtype=torch.float64)

    def prepare(self, batches: Sequence[Batch]) -> list[Prepared]:
        """Answers' numbers."""
        prepared = []
        for number, batch in enumerate(batches):
            answers = Answers.of(batch)
            whole = {NUMBER: torch.tensor(number), ANSWERS: torch.tensor(answers.count)}
            tokens = {SEQUENCE: answers.sequence_T[None]}
            prepared.append(Prepared(batch.modality.long(), tokens=tokens, whole=whole))
        return prepared

    def loss(self, model: Any, hidden_L1H: torch.Tensor, batch: MicroBatch, scales_N: torch.Tensor) -> Loss:
        """Adds up; the loss is nothing."""
        losses_L, correct_L = model.token_losses(hidden_L1H, batch.labels_1L, chunk_size=self._chunk_size)
        classes = len(CLASSES)
        sums = losses_L.new_zeros((int(batch.whole[ANSWERS]) + 1) * classes, dtype=torch.float64)
        cells_L = batch.prepared_L[SEQUENCE] * classes + batch.cells_L % classes
        sums.index_add_(0, cells_L, -losses_L.double())
        self.found[int(batch.whole[NUMBER])] = sums.reshape(-1, classes)[:-1].clone()
        return Loss(losses_L.sum() * 0.0, losses_L, correct_L)

    def value(self, totals: Totals, source: int | None = None) -> float:
        """There is none."""
        return float("nan")

    def named(self, totals: Totals) -> dict[str, float]:
        """Nothing is reported."""
        return {}


class CachedReference:
    """The kept answers of the sources, in the order of `Batch.source`."""

    def __init__(self, values: Sequence[Values]) -> None:
        self._values = values

    def __call__(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """See `Reference`."""
        return [self._of(batch) for batch in batches]

    def _of(self, batch: Batch) -> torch.Tensor:
        answers = Answers.of(batch)
        rows = [
            self._values[source][document, place % 2]
            for place, (source, document) in enumerate(
                zip(answers.source_R.tolist(), answers.document_R.tolist(), strict=True)
            )
        ]
        values_RC = torch.from_numpy(np.array(rows).reshape(-1, len(CLASSES)))
        if not bool(torch.isfinite(values_RC).all()):
            raise UserError("the reference was not asked about a pair of this run; delete its cache")
        return values_RC


def load_reference(config: PreferenceTrainingConfig, vocabulary: Vocabulary) -> list[torch.nn.Module]:
    """The chunks of a run's reference, in the run's layout and precision.

    Raises:
        UserError: it has another vocabulary than the pairs.
    """
    chunks, _, known = load_model_for_inference(
        config.reference,
        config.parallel,
        averaged=False,
        precision=config.trainer.precision,
        verify=config.checkpoint.verify,
    )
    if known.fingerprint != vocabulary.fingerprint:
        raise UserError(
            f"the reference {config.reference} has the vocabulary {known.name!r}, the pairs "
            f"{vocabulary.name!r}; give a reference that knows their ids"
        )
    return chunks


def load_cached(config: PreferenceTrainingConfig, sources: Mapping[str, SourceConfig]) -> CachedReference:
    """The kept answers about some sources; they must exist, see `fill_caches`.

    Raises:
        UserError: a cache is of another checkpoint or other pairs, or damaged.
    """
    return CachedReference([_load(config, name, source) for name, source in sources.items()])


def fill_caches(config: PreferenceTrainingConfig, machine: Platform) -> None:
    """Ask the reference about all pairs of every source that has no cache yet. All ranks call it together."""
    sources = {**config.data.sources, **config.data.validation}
    missing: list[Any] = [[name for name in sources if not _path(config, name).is_file()]]
    torch.distributed.broadcast_object_list(missing)
    for name in missing[0]:
        identity = _identity(config, sources[name])
        values = _asked(config, name, sources[name], machine)
        if is_rank_zero():
            with atomic_write(_path(config, name)) as stream:
                np.savez(stream, values=values, identity=np.array(json.dumps(identity)))
    torch.distributed.barrier()


def _asked(config: PreferenceTrainingConfig, name: str, source: SourceConfig, machine: Platform) -> Values:
    """Every answer's sums, ``[pairs, 2, C]`` on all ranks; NaN for pairs that are longer than a window."""
    from megatron.core import parallel_state

    plan, count = every_pair(config, name, source)
    size = config.trainer.global_batch_size
    loader = WindowLoader(
        plan,
        global_batch_size=size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )
    chunks = load_reference(config, plan.mixture.vocabulary)
    model = ReferenceModel(chunks, (name,), config.loss.chunk_size, machine.device)
    groups = Groups.current()
    pairs = len(plan.mixture.sources[0].dataset)
    # One more class counts who has answered.
    sums = torch.zeros(pairs, 2, len(CLASSES) + 1, dtype=torch.float64)
    if is_rank_zero():
        logger.info("asking the reference about %d pairs of %s, in %d windows", pairs, name, count)
    for _, batches in zip(range(0, count, size), loader, strict=False):
        for batch, values_RC in zip(batches, model(batches), strict=True):
            # The last step may go beyond the last pair, into the next epoch.
            if batch.windows[0] < count and groups.counts_here and groups.is_first_context_rank:
                document_R = Answers.of(batch).document_R
                sums[document_R, torch.arange(len(document_R)) % 2, :-1] = values_RC
                sums[document_R, torch.arange(len(document_R)) % 2, -1] = 1
    whole = sums.to(machine.device)
    torch.distributed.all_reduce(whole)
    values = whole.cpu().numpy()
    return np.where(values[..., -1:] == 1, values[..., :-1], np.nan)


def _load(config: PreferenceTrainingConfig, name: str, source: SourceConfig) -> Values:
    path, now = _path(config, name), _identity(config, source)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            values, then = arrays["values"], json.loads(str(arrays["identity"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it to have it made again") from error
    changed = [f"{key} {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key]]
    if changed:
        raise UserError(
            f"{path} holds the answers of another reference or about other pairs ({'; '.join(changed)}); set "
            "dpo.reference back, or give dpo.reference_cache another folder"
        )
    return values


def _path(config: PreferenceTrainingConfig, name: str) -> Path:
    return Path(config.dpo.reference_cache or Path(config.run) / "reference") / f"{name}.npz"


def _identity(config: PreferenceTrainingConfig, source: SourceConfig) -> dict[str, Any]:
    """What determines the answers; the checkpoint by the checksums of its files."""
    folder = sound_checkpoint(Path(config.reference), checksums=config.checkpoint.verify)
    template = pair_template(config, source)
    return {
        "version": CACHE_VERSION,
        "checkpoint": hashlib.sha256((folder / checkpoint_files.COMMIT).read_bytes()).hexdigest(),
        "pairs": MultimodalDataset.open(source.path).fingerprint,
        "bos": template.bos,
        "eos": template.eos,
        "precision": config.trainer.precision,
    }
