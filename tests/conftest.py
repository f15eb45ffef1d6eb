"""The order of the tests."""

from __future__ import annotations

from collections import Counter

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that may take longest come first, then those of many tests, so that no process ends alone."""
    tests = Counter(item.path for item in items)

    def weight(item: pytest.Item) -> tuple[float, int, str]:
        limit = item.get_closest_marker("timeout")
        return (-limit.args[0] if limit else 0.0, -tests[item.path], str(item.path))

    items.sort(key=weight)
