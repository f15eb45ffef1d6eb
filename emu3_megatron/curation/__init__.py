"""Raw media to a clean manifest: stages with scores and thresholds, and captions.

Needs the packages of the extra ``curation``.
"""

from emu3_megatron.errors import UserError

try:
    from emu3_megatron.curation.config import CaptionConfig, CurationConfig
    from emu3_megatron.curation.job import CurationJob, curate
    from emu3_megatron.curation.quality import QualityScorer
    from emu3_megatron.curation.report import Report
    from emu3_megatron.curation.units import Decision, Stage, Unit
except ModuleNotFoundError as error:
    if (error.name or "").startswith("emu3_megatron"):
        raise
    raise UserError(
        f"curation needs the package {error.name}, of the extra `curation`: pip install -e .[curation]"
    ) from error

__all__ = [
    "CaptionConfig",
    "CurationConfig",
    "CurationJob",
    "Decision",
    "QualityScorer",
    "Report",
    "Stage",
    "Unit",
    "curate",
]
