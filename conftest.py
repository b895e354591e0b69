"""Options and fixtures for all tests.

pytest puts the folder of this file on sys.path, so that plain `pytest` finds the modules.
"""

import pytest
import tiktoken
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


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """Make "theirs" the name of a tiktoken encoding of 256 bytes and <|endoftext|>.

    It stands in for gpt2, which tiktoken would download. The current folder has a folder of that
    name, as it does if a user keeps GPT-2's weights there.
    """
    enc = tiktoken.Encoding(
        "theirs",
        pat_str=r"\w+|\W",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"theirs": enc}[name])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
