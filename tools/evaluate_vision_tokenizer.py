"""Measure how well a vision tokenizer reconstructs a folder of images and videos.

python tools/evaluate_vision_tokenizer.py --tokenizer FOLDER --data FOLDER --output FOLDER [--sizes "[256]"]

Prints a table of LPIPS, PSNR, SSIM, rFID and the use of the codebook, and writes it to OUTPUT beside the
same figures as JSON and sheets of originals, reconstructions and differences. LPIPS takes the weights of a
backbone, which are downloaded; without a network give --lpips_weights FILE, or leave LPIPS out with
--lpips none.
"""

from __future__ import annotations

from emu3_megatron.errors import run_main
from emu3_megatron.settings import read_settings
from emu3_megatron.tokenization.evaluation import EvaluationConfig, evaluate_folder
from emu3_megatron.vision.evaluation import table


def main() -> None:
    """Read the settings from YAML and the command line, evaluate, and print the table."""
    config = read_settings(EvaluationConfig, __doc__)
    rows = evaluate_folder(config)
    print(table(rows), end="")
    print(f"table, scores and sheets: {config.output}")


if __name__ == "__main__":
    run_main(main)
