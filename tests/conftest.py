"""Fixtures that several test files use. The functions that they share are in helpers.py."""

import pytest


@pytest.fixture(scope="session")
def tok():
    import gpt  # here, so that the tests without a model start without torch

    return gpt.Tokenizer("task")


@pytest.fixture(scope="module")
def tiny_vocabulary():
    """Checkpoints with the vocabulary of helpers.random_model are accepted, whatever tokenizer they name."""
    from helpers import V

    from data import checkpoints

    with pytest.MonkeyPatch.context() as patch:
        for name, sizes in checkpoints.VOCABULARIES.items():
            patch.setitem(checkpoints.VOCABULARIES, name, (*sizes, V))
        yield
