"""The generation engine and its tasks.

`Engine` continues sequences under the grammar; `Generator` turns prompts into pixels and captions. Importing
this package needs nothing of megatron-core; install the platform before the first use.
"""

from emu3_megatron.inference.bundle import ModelBundle, open_bundle
from emu3_megatron.inference.engine import Engine
from emu3_megatron.inference.request import Completion, Request
from emu3_megatron.inference.sampling import Sampling
from emu3_megatron.inference.tasks import Caption, GeneratedImage, GeneratedVideo, Generator

__all__ = [
    "Caption",
    "Completion",
    "Engine",
    "GeneratedImage",
    "GeneratedVideo",
    "Generator",
    "ModelBundle",
    "Request",
    "Sampling",
    "open_bundle",
]
