import pytest
from hypothesis import settings

from emu3_megatron.text import QwenTokenizer
from tests.text.qwen_file import qwen_ranks_file

# on a busy machine one example may take long for no fault of the code
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

COLOURS = {"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色"}
SHAPES = {"circle": "圆形", "square": "方形", "star": "星形"}
PLACES = {"top left": "左上角", "center": "中间", "bottom right": "右下角"}

SPELLINGS = (
    *(
        "<|endoftext|>",
        "<|im_start|>",
        "<|extra_203|>",
        "<|extra_204|>",
        "<|image start|>",
        "<|image token|>",
    ),
    *(
        "<|image end|>",
        "<|visual token 000000|>",
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "<0x41>",
        "[BOS]",
        "<image>",
    ),
)
"""How control tokens are spelled, here and elsewhere."""


@pytest.fixture(scope="session")
def captions() -> list[str]:
    english = [f"a {c} {s} at the {p}" for c in COLOURS for s in SHAPES for p in PLACES]
    chinese = [
        f"{p}有一个{c}{s}。" for c in COLOURS.values() for s in SHAPES.values() for p in PLACES.values()
    ]
    return english + chinese


@pytest.fixture(scope="session")
def qwen() -> QwenTokenizer:
    return QwenTokenizer(qwen_ranks_file())
