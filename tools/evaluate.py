"""Run benchmarks on a training run or a Hugging Face folder, and collect their scores.

python tools/evaluate.py generate --suite geneval --prompts FILE.jsonl --checkpoint FOLDER --output OUT
python tools/evaluate.py answer --data MMBench_DEV_EN.tsv --checkpoint FOLDER --output OUT
python tools/evaluate.py score --output OUT [--clip FOLDER --detector FOLDER | --results FILE ...]
python tools/evaluate.py report OUT ... --output report.html
"""

from __future__ import annotations

from emu3_megatron.errors import run_main
from emu3_megatron.evaluation.command_line import main

if __name__ == "__main__":
    run_main(main)
