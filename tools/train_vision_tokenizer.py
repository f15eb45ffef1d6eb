"""Train a vision tokenizer on the images and videos of a manifest.

python tools/train_vision_tokenizer.py --config FILE.yaml [--schedule.steps 500 ...]
torchrun --nproc-per-node 2 tools/train_vision_tokenizer.py --config FILE.yaml
"""

from __future__ import annotations

from emu3_megatron.errors import run_main
from emu3_megatron.settings import read_settings
from emu3_megatron.vision.training import train
from emu3_megatron.vision.training_config import VisionTrainingConfig


def main() -> None:
    """Read the configuration from YAML and the command line, and train."""
    train(read_settings(VisionTrainingConfig, __doc__))


if __name__ == "__main__":
    run_main(main)
