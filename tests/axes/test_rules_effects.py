"""Operators without a tensor result: they hold nothing back, and assertions about sizes are dropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from ecospa_fx.axes import registry
from ecospa_fx.axes.narrowing import Narrowing
from ecospa_fx.axes.resize import Resize, find_resize
from tests.support.oracle import Case, check_exact, check_literal, check_rule, sandwich, tagged

CASES = [
    sandwich("aten._assert_tensor_metadata", lambda h: h.relu().float().to(h), label="cast"),
    sandwich("aten._assert_tensor_metadata", lambda h: h.to(torch.float32).relu().to(h), label="there-and-back"),
]


def test_literal(case: Case) -> None:
    check_literal(case)


def test_exact(case: Case) -> None:
    check_exact(case)


def test_one_call() -> None:
    assert check_rule(lambda a: a.float().double(), [tagged(4, 6)]) == 2


@pytest.mark.parametrize(("given", "edits"), [
    ({"size": [2, 8], "stride": None}, {"size": None, "stride": None}),
    ({"size": None, "stride": [8, 1]}, {"size": None, "stride": None}),
    ({"dtype": torch.float64}, {}),
])  # fmt: skip
def test_assertions_about_sizes_are_dropped(given: dict[str, Any], edits: dict[str, Any]) -> None:
    registry.load()
    name, node = "aten._assert_tensor_metadata", fx.Graph().placeholder("x")
    resize = Resize(node, name, given, ([], []), Narrowing((), {}), lambda size, old, new: size)
    rule = find_resize(name)
    assert rule is not None
    rule(resize)
    assert resize.edits == edits
