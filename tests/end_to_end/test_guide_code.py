"""Code in the guides runs as it is printed; a prelude makes what a page takes for granted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Quickstart
from tests.programs import ROOT, Programs

DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
TESTED_ELSEWHERE = {"grammar.md"}
"""By `tests/grammar/test_grammar_docs.py`. Code that a page includes from a file is tested as that file."""

LINKS = {
    "FOLDER": "hugging-face",
    "runs/quickstart/hugging-face": "hugging-face",
    "datasets/images": "data/images",
    "datasets/text": "data/texts",
    "path/to/tokenizer": "vision-tokenizer",
}
"""Places that the pages name, and what of the quickstart stands there."""

VOCABULARY = """
from emu3_megatron.vocabulary import Vocabulary
vocabulary = Vocabulary.build("guide", text_size=300, codebook_size=64)
"""

PAGES = {
    "conversion.md": ("", "assert model.model.vqmodel is not None and processor is not None"),
    "data-format.md": (
        VOCABULARY
        + """
from emu3_megatron.data import MultimodalDataset, ShardWriter
from emu3_megatron.grammar import Dialect, Image
from emu3_megatron.text.bytes import ByteTokenizer
import numpy as np
vocabulary = Vocabulary.build("guide", text_size=ByteTokenizer().size, codebook_size=64)
dialect = Dialect.preset("emu3", vocabulary, ByteTokenizer())
folder, caption_ids = "photos", [1, 2]
short_ids, long_ids, chinese_ids = [1], [2, 3, 4], [5]
span_ids = dialect.encode_span(Image(np.zeros((2, 2), dtype=np.int64)))
for shard in set(range(64)) - {3}:
    with ShardWriter(folder, "photos", shard=shard, num_shards=64, vocabulary=vocabulary) as writer:
        writer.add_document([(caption_ids, 0)], sample_id=f"other-{shard}")
""",
        "assert len(MultimodalDataset.open(folder)) == 65",
    ),
    "inference.md": (
        "",
        "assert len(images) == 2\n"
        "assert images[0].pixels.shape == (64, 64, 3) and images[0].codes.shape == (8, 8)",
    ),
    "media.md": (
        """
import numpy as np
from emu3_megatron.media import write_mp4, write_png
write_png("b.png", np.zeros((80, 60, 3), dtype=np.uint8))
from PIL import Image
Image.new("RGB", (60, 80)).save("a.jpg")
write_mp4("c.mp4", np.zeros((24, 64, 64, 3), dtype=np.uint8), 12)
""",
        "assert pictures.shape == (2, 3, 256, 256) and clip.shape == (8, 3, 256, 256)",
    ),
    "model.md": (
        """
import torch
tokens = torch.randint(0, 900, (1, 32))
labels, weights = tokens.roll(-1, 1), torch.ones(1, 32)
cu_seqlens = torch.tensor([0, 12, 32], dtype=torch.int32)
""",
        "assert loss.total.isfinite() and any(each.grad is not None or hasattr(each, 'main_grad')"
        " for each in model.parameters())",
    ),
    "packing.md": (
        """
import numpy as np
lengths = np.array([3000, 2000, 6000, 100])
is_text = np.array([False, False, False, True])
windows_consumed, rank, ranks, last = 256, 1, 2, 768
steps = []
step = steps.append
""",
        "assert packed.dropped.tolist() == [2] and len(steps) == 2 and len(steps[0]) == 64",
    ),
    "samples.md": (
        """
import numpy as np
from emu3_megatron.samples import World
world, rng = World(WorldConfig.preset("full")), np.random.default_rng(0)
still, moving = (world.sample(rng, medium, "train") for medium in ("image", "video"))
pixels, frames = world.render(still), world.render_clip(moving)
""".replace("import World\n", "import World, WorldConfig\n"),
        "assert checker.read_image(pixels).shape == still.shape\n"
        "assert checker.read_clip(frames).direction == moving.direction",
    ),
    "vision-tokenizer.md": (
        "import torch\npixels = torch.rand(1, 3, 64, 64) * 2 - 1\n",
        "assert codes.shape == (1, 8, 8) and pixels.shape == (1, 3, 64, 64)",
    ),
}
"""By page: what stands before its code, and what holds after it."""


def code(page: Path) -> list[str]:
    """The blocks of a page that are printed there, and not included from a file."""
    return [block for block in BLOCK.findall(page.read_text()) if not block.startswith("--8<--")]


def test_every_page_with_code_is_tested() -> None:
    with_code = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if code(page)}
    assert with_code == set(PAGES) | TESTED_ELSEWHERE


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(
    page: str, program: Programs, quickstart: Quickstart, tmp_path: Path
) -> None:
    for name, target in LINKS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(quickstart.run / target)
    before, after = PAGES[page]
    start = f"import os\nos.chdir({str(tmp_path)!r})\n"
    script = tmp_path / "page.py"
    script.write_text("\n".join([start, before, *code(DOCS / page), after]))
    ended = program(script)
    assert ended.code == 0, ended.err[-4000:]
