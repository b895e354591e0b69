"""Options and fixtures for all tests.

pytest puts the folder of this file on sys.path, so that plain `pytest` finds the modules.
"""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes: python -m pytest --slow"))


@pytest.fixture
def seeded():
    """Seed torch before the test."""
    torch.manual_seed(0)
