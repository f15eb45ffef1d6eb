"""The stages of each kind of entry, and how an entry walks through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from emu3_megatron.curation.config import CurationConfig, ImageConfig, TextConfig, VideoConfig
from emu3_megatron.curation.contamination import ContaminationStage
from emu3_megatron.curation.duplicates import DuplicatesStage
from emu3_megatron.curation.image_type import TypeStage
from emu3_megatron.curation.motion import MotionStage
from emu3_megatron.curation.ocr import TextCoverageStage
from emu3_megatron.curation.probe import ImageProbe, PartStage, VideoProbe
from emu3_megatron.curation.quality import QualityStage, ReadmissionStage, make_scorer
from emu3_megatron.curation.scenes import SceneStage
from emu3_megatron.curation.text_filters import (
    ExactDuplicatesStage,
    LanguageStage,
    LengthStage,
    NearDuplicatesStage,
    RepetitionStage,
)
from emu3_megatron.curation.units import (
    KEEP,
    Comparer,
    ComparingStage,
    Decision,
    Score,
    SplittingStage,
    Stage,
    Unit,
    drop,
)

UNUSABLE = "unusable"
"""Reason of a unit whose file cannot be used."""

ScoreOf = Callable[[Stage, Unit], Score]


@dataclass(frozen=True)
class Step:
    """A unit's passage through a stage."""

    unit: Unit
    stage: Stage | None
    """None: the unit has passed all of its stages."""
    score: Score
    decision: Decision
    path: tuple[Step, ...] = ()
    """The steps that led here."""
    made: bool = False
    """Whether the unit is one of those that the stage has split another into."""


class Pipeline:
    """The stages of a configuration. Weights are loaded on construction."""

    def __init__(self, config: CurationConfig) -> None:
        """Build the stages. Raises `UserError` for what does not fit together."""
        known = {
            "image": _image_stages(config.image),
            "video": _video_stages(config.video),
            "text": _text_stages(config.text),
        }
        self._part = PartStage()
        tail: list[Stage] = []
        if config.contamination.prompts or config.contamination.images:
            tail.append(ContaminationStage(config.contamination))
        self.stages: dict[str, tuple[Stage, ...]] = {
            kind: (*(stages[name] for name in getattr(config, kind).stages), *tail)
            for kind, stages in known.items()
        }

    def comparers(self) -> dict[str, Comparer]:
        """New memories for one pass, by the key of stage and kind."""
        return {
            f"{kind}/{stage.name}": stage.comparer()
            for kind, stages in self.stages.items()
            for stage in stages
            if isinstance(stage, ComparingStage)
        }

    def walk(
        self, unit: Unit, score_of: ScoreOf, comparers: Mapping[str, Comparer] | None = None
    ) -> Iterator[Step]:
        """Take an entry, and what it is split into, through its stages until each is dropped or has passed.

        Args:
            unit: an entry.
            score_of: gives the score of a stage for a unit; with the key ``error`` where there is none.
            comparers: memories for the comparing stages; where None, these keep everything.
        """
        path: tuple[Step, ...] = ()
        if self._part.applies_to(unit):
            score = score_of(self._part, unit)
            step = Step(unit, self._part, score, _decide(self._part, unit, score, comparers))
            yield step
            if not step.decision.keep:
                return
            unit, path = self._part.part(unit, score), (step,)
        yield from self._walk(unit, self.stages[unit.kind], frozenset(), score_of, comparers, path)

    def _walk(
        self,
        unit: Unit,
        stages: Sequence[Stage],
        flags: frozenset[str],
        score_of: ScoreOf,
        comparers: Mapping[str, Comparer] | None,
        path: tuple[Step, ...],
    ) -> Iterator[Step]:
        for place, stage in enumerate(stages):
            if not stage.applies(flags):
                continue
            score = score_of(stage, unit)
            step = Step(unit, stage, score, _decide(stage, unit, score, comparers), path)
            path = (*path, step)
            flags |= step.decision.flags
            yield step
            if not step.decision.keep:
                return
            if isinstance(stage, SplittingStage):
                for part, decision in stage.split(unit, score):
                    yield Step(part, stage, {}, decision, made=True)
                    if decision.keep:
                        yield from self._walk(part, stages[place + 1 :], flags, score_of, comparers, path)
                return
        yield Step(unit, None, {}, KEEP, path)


def look_ahead(step: Step, comparers: Mapping[str, Comparer]) -> None:
    """Show a step of a walk without comparers to the comparer whose stage it is."""
    if not isinstance(step.stage, ComparingStage) or "error" in step.score:
        return
    quality = next((before.score["quality"] for before in step.path if "quality" in before.score), None)
    comparers[_name(step.unit, step.stage)].look_ahead(step.unit, step.score, quality)


def _name(unit: Unit, stage: Stage) -> str:
    """Under which a stage's comparer is kept: a stage of images knows nothing of videos."""
    return f"{unit.kind}/{stage.name}"


def _decide(stage: Stage, unit: Unit, score: Score, comparers: Mapping[str, Comparer] | None) -> Decision:
    """The decision of a stage."""
    if "error" in score:
        return drop(UNUSABLE, score["error"])
    if isinstance(stage, ComparingStage):
        return KEEP if comparers is None else comparers[_name(unit, stage)].decide(unit, score)
    return stage.decide(unit, score)


def _image_stages(config: ImageConfig) -> dict[str, Stage]:
    """Stages for images by name; those not asked for are not built."""
    stages: dict[str, Stage] = {}
    if "probe" in config.stages:
        stages["probe"] = ImageProbe(config.probe)
    if "type" in config.stages:
        stages["type"] = TypeStage(config.type)
    if "quality" in config.stages:
        least = config.readmission.min_score if "readmission" in config.stages else None
        stages["quality"] = QualityStage(config.quality, make_scorer(config.quality), readmit_from=least)
        stages["readmission"] = ReadmissionStage(config.readmission)
    stages["duplicates"] = DuplicatesStage(config.duplicates)
    return stages


def _video_stages(config: VideoConfig) -> dict[str, Stage]:
    """Stages for video by name."""
    stages: dict[str, Stage] = {
        "probe": VideoProbe(config.probe),
        "scenes": SceneStage(config.scenes),
        "text_coverage": TextCoverageStage(config.text_coverage),
        "duplicates": DuplicatesStage(config.duplicates),
    }
    if "motion" in config.stages:
        stages["motion"] = MotionStage(config.motion)
    if "quality" in config.stages:
        stages["quality"] = QualityStage(config.quality, make_scorer(config.quality))
    return stages


def _text_stages(config: TextConfig) -> dict[str, Stage]:
    """Stages for text by name."""
    return {
        "length": LengthStage(config),
        "language": LanguageStage(config),
        "repetition": RepetitionStage(config),
        "exact_duplicates": ExactDuplicatesStage(),
        "near_duplicates": NearDuplicatesStage(config),
    }
