"""Where the registry package `dashscope` (a test dependency) keeps Qwen's ranks file."""

from importlib.util import find_spec
from pathlib import Path


def qwen_ranks_file() -> Path:
    spec = find_spec("dashscope")
    assert spec is not None, "install the test extras: dashscope holds Qwen's ranks file"
    assert spec.origin is not None
    return Path(spec.origin).parent / "resources" / "qwen.tiktoken"
