"""How tests are spread over processes: ``pytest -n auto --dist loadgroup``."""

from __future__ import annotations

import pytest

# Tests that share what is expensive to set up, or must not build beside each other.
TOGETHER = ("build", "distributed")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Has one process run all tests with such a marker."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        for name in TOGETHER:
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.xdist_group(name))
                break
