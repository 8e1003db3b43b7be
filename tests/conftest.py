"""Where pytest finds the fixtures."""

import os

import pytest


pytest.register_assert_rewrite("support")


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, but where this process only hands tests out to others, which takes seconds less."""
    if "PYTEST_XDIST_WORKER" in os.environ or not config.getoption("numprocesses", default=None):
        config.pluginmanager.import_plugin("support.fixtures")
