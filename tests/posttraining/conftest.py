"""The fixtures of training: tiny datasets and a configuration."""

from tests.training.conftest import config_file, tiny_data

__all__ = ["config_file", "tiny_data"]
