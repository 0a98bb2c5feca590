"""Fixtures that several test files use. The functions that they share are in helpers.py."""

import pytest


@pytest.fixture(scope="session")
def tok():
    import gpt  # here, so that the tests without a model start without torch

    return gpt.Tokenizer("task")
