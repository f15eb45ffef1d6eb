"""Raw media to a clean manifest: stages with scores and thresholds, and captions.

Needs the packages of the extra ``curation``.
"""

from emu3_megatron.curation.config import CurationConfig
from emu3_megatron.curation.job import CurationJob, curate
from emu3_megatron.curation.quality import QualityScorer
from emu3_megatron.curation.report import Report
from emu3_megatron.curation.units import Decision, Stage, Unit

__all__ = ["CurationConfig", "CurationJob", "Decision", "QualityScorer", "Report", "Stage", "Unit", "curate"]
