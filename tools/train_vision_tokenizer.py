"""Train a vision tokenizer on the images and videos of a manifest.

python tools/train_vision_tokenizer.py --config FILE.yaml [--schedule.steps 500 ...]
torchrun --nproc-per-node 2 tools/train_vision_tokenizer.py --config FILE.yaml
"""

from __future__ import annotations

from jsonargparse import ArgumentParser

from emu3_megatron.errors import run_main
from emu3_megatron.vision.training import train
from emu3_megatron.vision.training_config import VisionTrainingConfig


def main() -> None:
    """Read the configuration from YAML and the command line, and train."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--config", action="config", help="YAML file with the same keys as the options")
    parser.add_class_arguments(VisionTrainingConfig)
    values = parser.instantiate(parser.parse_args())
    values.pop("config", None)
    train(VisionTrainingConfig(**values.as_dict()))


if __name__ == "__main__":
    run_main(main)
