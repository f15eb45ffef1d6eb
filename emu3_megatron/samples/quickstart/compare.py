"""Compares the exported Hugging Face folder, opened by transformers alone, with the trained model.

Run as ``python -m emu3_megatron.samples.quickstart.compare RUN``; writes ``RUN/evaluation/export.json``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from emu3_megatron.errors import UserError, run_main
from emu3_megatron.files import write_json_atomic
from emu3_megatron.grammar import Document, Image, Text
from emu3_megatron.media import load_stills
from emu3_megatron.samples import read_manifest

DOCUMENTS = 8
"""Held-out pictures whose documents go through both models."""


@torch.no_grad()
def compare(run: Path) -> dict[str, Any]:
    """Largest differences between the two models.

    Returns:
        ``export_max_abs_logit_difference``: over all ids in use, all positions of `DOCUMENTS` captioned
        pictures, both orders. ``export_equal_vision_codes``: whether transformers' vision tokenizer gives
        the same codes.

    Raises:
        UserError: the vision codes differ.
    """
    from transformers import Emu3ForConditionalGeneration

    from emu3_megatron.conversion.checkpoints import logit_difference
    from emu3_megatron.inference.bundle import open_bundle

    bundle = open_bundle(
        run / "training", text_tokenizer=run / "text.model", vision_tokenizer=run / "vision-tokenizer"
    )
    rows = read_manifest(run / "corpus" / "held-out-images.jsonl")[:DOCUMENTS]
    pixels_NCHW = load_stills([run / "corpus" / str(row["image"]) for row in rows], (64, 64))
    codes = bundle.vision_tokenizer.encode(pixels_NCHW)
    exported = Emu3ForConditionalGeneration.from_pretrained(run / "hugging-face", dtype=torch.float32).eval()
    theirs = exported.model.vqmodel.encode(pixels_NCHW, torch.tensor([pixels_NCHW.shape[-2:]] * len(rows)))
    equal = all(torch.equal(a, b) for a, b in zip(codes, theirs.image_tokens, strict=True))
    if not equal:
        raise UserError(
            f"{run / 'hugging-face'}: its vision tokenizer gives other codes than the trained one"
        )
    sequences = []
    for row, own in zip(rows, codes, strict=True):
        segments = (Text(str(row["caption"])), Image(own.numpy()))
        sequences += [bundle.dialect.encode(Document(s)).ids.tolist() for s in (segments, segments[::-1])]
    largest = logit_difference(bundle.model, run / "hugging-face", sequences)
    return {"export_max_abs_logit_difference": largest, "export_equal_vision_codes": equal}


def main() -> None:
    """Argument: the run's folder."""
    run = Path(sys.argv[1])
    from emu3_megatron.parallel import platform
    from emu3_megatron.parallel.config import ParallelConfig

    device = platform.install("cpu")
    from emu3_megatron.parallel.groups import destroy_parallel, initialize_parallel

    initialize_parallel(ParallelConfig(), device, 0)
    result = compare(run)
    write_json_atomic(run / "evaluation" / "export.json", result)
    print(f"largest logit difference {result['export_max_abs_logit_difference']:.3g}")
    destroy_parallel()


if __name__ == "__main__":
    run_main(main)
