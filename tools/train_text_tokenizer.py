"""Train a SentencePiece model on the captions and texts of one or more manifests (JSON Lines)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from emu3_megatron.errors import run_main
from emu3_megatron.files import json_lines
from emu3_megatron.text import train_sentencepiece
from emu3_megatron.tokenization.entries import Entry, parse_record


def texts_of(manifests: list[Path]) -> Iterator[str]:
    """The captions and texts in order, without the entries that tokenization would set aside."""
    for path in manifests:
        for record in json_lines(path):
            entry = parse_record(record, place=str(path), folder=path.parent)
            if isinstance(entry, Entry) and entry.text is not None:
                yield from (entry.text, *entry.alternatives)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", type=Path, nargs="+", required=True, help="JSON Lines files")
    parser.add_argument("--output", type=Path, required=True, help="the model file, such as text.model")
    parser.add_argument(
        "--vocab-size", type=int, default=512, help="upper bound of the number of ids (default: 512)"
    )
    arguments = parser.parse_args()
    tokenizer = train_sentencepiece(texts_of(arguments.manifest), arguments.output, arguments.vocab_size)
    print(f"{arguments.output}: {tokenizer.size} ids")


if __name__ == "__main__":
    run_main(main)
