"""Choose the entries of a manifest with the best average of several preference scores.

Every entry holds `scores`, an object of numbers by name, higher being better. The result is a manifest for
tools/tokenize_media.py. See docs/post-training.md.
"""

from emu3_megatron.errors import run_main
from emu3_megatron.posttraining.selection import SelectionConfig, select
from emu3_megatron.settings import read_settings


def main() -> None:
    """Parse the command line and choose."""
    config = read_settings(SelectionConfig, __doc__)
    result = select(config)
    print(
        f"{config.output}: {result.chosen:,} of {result.entries:,} entries, average {result.least:.4g} and "
        f"better; {result.unscored:,} lack a score"
    )


if __name__ == "__main__":
    run_main(main)
