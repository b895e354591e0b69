"""Being here, this file puts the root on the path, so that plain `pytest` finds the modules, too. Long proofs run with --slow."""
import pytest


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the proofs that take minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long proof: python -m pytest --slow"))
