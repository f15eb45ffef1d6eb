import pytest
from hypothesis import settings

from emu3_megatron.grammar import Dialect
from emu3_megatron.text import ByteTokenizer
from emu3_megatron.vocabulary import Vocabulary
from tests.grammar.reference import CODES

# on a busy machine one example may take long for no fault of the code
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

NAMES = ("emu3", "emu3-frames", "emu3.5")


@pytest.fixture(scope="session")
def small_vocabulary() -> Vocabulary:
    return Vocabulary.build("test", text_size=256, codebook_size=CODES)


@pytest.fixture(scope="session")
def dialects(small_vocabulary) -> dict[str, Dialect]:
    return {name: Dialect.preset(name, small_vocabulary, ByteTokenizer()) for name in NAMES}


@pytest.fixture(scope="session", params=NAMES)
def dialect(request, dialects) -> Dialect:
    return dialects[request.param]
