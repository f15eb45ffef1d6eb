from collections.abc import Iterator

import pytest

from emu3_megatron.parallel import platform
from emu3_megatron.parallel.config import ParallelConfig
from emu3_megatron.parallel.groups import destroy_parallel, initialize_parallel


@pytest.fixture(scope="module")
def single_process() -> Iterator[ParallelConfig]:
    """Process groups of a world of one on the CPU."""
    layout = ParallelConfig()
    initialize_parallel(layout, platform.install("cpu"), seed=1)
    yield layout
    destroy_parallel()
