"""Raw media to a clean manifest: images, video and text through filters whose thresholds can be changed.

python tools/curate.py --manifest raw.jsonl --output curated
python tools/curate.py --config FILE.yaml [--video.motion.min_motion 0.004 ...]

Scores are kept: run again with other thresholds, or after any interruption. OUTPUT/manifest.jsonl is the
result, OUTPUT/report.html shows what was dropped and why, OUTPUT/quarantine.jsonl lists what cannot be used.
"""

from __future__ import annotations

from emu3_megatron.errors import run_main
from emu3_megatron.settings import read_settings


def main() -> None:
    """Read the settings from YAML and the command line, and run one worker."""
    from emu3_megatron.curation import CurationConfig, curate  # inside: a missing package is a user's error

    config = read_settings(CurationConfig, __doc__)
    report = curate(config)
    if report is None:
        print("this worker's scores are finished; other workers' are not")
    else:
        print(report.as_markdown())
        print(
            f"clean manifest: {config.output / 'manifest.jsonl'}; to look at: {config.output / 'report.html'}"
        )


if __name__ == "__main__":
    run_main(main)
