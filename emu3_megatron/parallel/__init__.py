"""Process groups, context parallelism and the platform (CUDA or CPU)."""
