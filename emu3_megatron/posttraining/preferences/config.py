"""Configuration of preference training: a training run with a section of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from emu3_megatron.errors import UserError
from emu3_megatron.grammar.document import Modality
from emu3_megatron.training.config import TrainingConfig, require

CountedClass = Literal["text", "vision", "meta", "break", "control"]


@dataclass(kw_only=True)
class DPOConfig:
    """The loss of a pair, and where the reference's log-probabilities come from.

    With ``r = log p(answer) - log p_reference(answer)``, summed over the answer's counted tokens, and
    ``m = beta * (r_chosen - r_rejected)``, a pair's loss is ``-(1 - s) log sigma(m) - s log sigma(-m)`` with
    label smoothing s; added to it is `cross_entropy_weight` times the chosen answers' cross entropy.
    """

    beta: float = 0.1
    """Strength of the tie to the reference; large keeps the model near it (ours; the paper states none)."""
    label_smoothing: float = 0.0
    """Share of the pairs taken to be labelled the wrong way round (arXiv 2305.18290, section 4; ours:
    none)."""
    cross_entropy_weight: float = 1.0
    """Weight of the chosen answers' cross entropy, itself weighted by class as `loss` says and divided by the
    sum of weights (paper: it is added; its weight is not stated)."""
    length_normalization: bool = False
    """Take means over counted tokens for the sums; for answers of different lengths (ours)."""
    counted: list[CountedClass] = field(default_factory=lambda: ["vision"])
    """Classes of tokens whose log-probabilities count. The prompt's never do (ours: row ends and the like are
    forced by the grammar and say nothing of an image)."""
    reference: str | None = None
    """Run or checkpoint of the reference model; that of `checkpoint.load` where not set."""
    reference_mode: Literal["cached", "online"] = "cached"
    """Ask the reference once for every pair and keep its answers, or keep the reference in memory and ask it
    at every step."""
    reference_cache: str | None = None
    """Folder of the cached answers, which several runs may share; RUN/reference where not set."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.beta > 0, f"dpo.beta={self.beta} must be positive")
        require(
            0 <= self.label_smoothing < 0.5,
            f"dpo.label_smoothing={self.label_smoothing} must lie in [0, 0.5); with 0.5 nothing is learned",
        )
        require(
            self.cross_entropy_weight >= 0,
            f"dpo.cross_entropy_weight={self.cross_entropy_weight} must not be negative; 0 is off",
        )
        require(bool(self.counted), "dpo.counted is empty; name at least one class of tokens")

    @property
    def counted_classes(self) -> list[Modality]:
        """The classes of `counted`."""
        return [Modality[name.upper()] for name in self.counted]


@dataclass(kw_only=True)
class PreferenceTrainingConfig(TrainingConfig):
    """A run of preference training: every source of `data` holds pairs."""

    dpo: DPOConfig = field(default_factory=DPOConfig)
    """Loss and reference."""

    def __post_init__(self) -> None:
        """Check that there is a reference."""
        super().__post_init__()
        require(bool(self.reference), "dpo.reference is empty; name a run or a checkpoint")
        require(
            self.loss.z_loss == 0 and self.loss.end_weight is None,
            "preference training has neither loss.z_loss nor loss.end_weight; leave them out",
        )
        sources = {**self.data.sources, **self.data.validation}
        for name, source in sources.items():
            template = source.template or self.data.template
            require(
                template.caption_dropout == 0 and template.caption_after_probability == 0,
                f"source {name!r}: the prompts of pairs are neither dropped nor moved; leave caption_dropout "
                "and caption_after_probability at 0",
            )
            require(source.loss is None, f"source {name!r}: pairs have the run's `loss`; leave its own out")

    @property
    def reference(self) -> str:
        """Run or checkpoint of the reference model."""
        path = self.dpo.reference or self.checkpoint.load
        if path is None:
            raise UserError("no reference: set checkpoint.load or dpo.reference to a run or a checkpoint")
        return path

    @property
    def frozen_copies(self) -> int:
        """The reference, where it is asked at every step."""
        return int(self.dpo.reference_mode == "online")
