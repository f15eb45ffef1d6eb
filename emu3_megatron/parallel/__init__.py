"""Process groups, context parallelism and the platform (CUDA or CPU)."""

from emu3_megatron.parallel.config import LayoutError, ParallelConfig

__all__ = ["LayoutError", "ParallelConfig"]
