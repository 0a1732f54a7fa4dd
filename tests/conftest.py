"""One thread per process and a fixed seed per test, so that runs in parallel are fast and repeat."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.counting import Tokens, learnt

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every test, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def trained() -> nn.Module:
    """A language model that has learnt something, so that units differ in what they are worth. No test changes it."""
    return learnt(Tokens())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes a `case` runs once for each of its module's CASES, the table of a family of rules."""
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", metafunc.module.CASES, ids=lambda case: case.id)
