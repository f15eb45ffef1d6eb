"""Tokenize a text corpus, JSON Lines or plain text, into the shards of a dataset, by many processes.

python tools/tokenize_text.py --input [a.jsonl,b.jsonl.gz] --output data/text --text_tokenizer text.model \\
    --vocabulary emu3 --processes 16

Run it once, or as several workers (--worker i --num_workers n) that share the output folder; run it again
after any interruption: finished shards are kept. OUTPUT/quarantine.jsonl lists lines that cannot be used.
"""

from __future__ import annotations

from emu3_megatron.errors import run_main
from emu3_megatron.settings import read_settings


def main() -> None:
    """Read the settings from YAML and the command line, and run one worker."""
    from emu3_megatron.tokenization.text_job import TextJobConfig, tokenize_text  # slow to import

    config = read_settings(TextJobConfig, __doc__)
    if tokenize_text(config):
        print(f"dataset complete: {config.output / 'manifest.json'}")
    else:
        print("this worker's shards are finished; other workers' are not")


if __name__ == "__main__":
    run_main(main)
