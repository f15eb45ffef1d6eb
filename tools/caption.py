"""Caption the images and clips of a manifest, by a server or by a model of ours.

python tools/caption.py --manifest curated/manifest.jsonl --output captioned --url http://localhost:8000/v1
python tools/caption.py --manifest curated/manifest.jsonl --output captioned --checkpoint exported

Run it again after any interruption: what is paid for is in OUTPUT/journal.jsonl and not asked for again.
OUTPUT/manifest.jsonl is the result, OUTPUT/failures.jsonl lists what could not be captioned.
"""

from __future__ import annotations

from emu3_megatron.errors import run_main
from emu3_megatron.settings import read_settings


def main() -> None:
    """Read the settings, open the captioner and caption."""
    # Inside: a missing package is a user's error.
    from emu3_megatron.curation import CaptionConfig
    from emu3_megatron.curation.captions import CaptionJob
    from emu3_megatron.inference.captioner import open_captioner

    config = read_settings(CaptionConfig, __doc__)
    captioned, failed = CaptionJob(config, open_captioner(config)).run()
    print(f"{captioned} captions: {config.output / 'manifest.jsonl'}")
    if failed:
        print(f"{failed} failures: {config.output / 'failures.jsonl'}; run again to try these once more")


if __name__ == "__main__":
    run_main(main)
