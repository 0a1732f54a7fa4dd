"""The glossary: terms in alphabetical order, and the modules that it names exist."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

GLOSSARY = (Path(__file__).resolve().parents[2] / "docs" / "glossary.md").read_text(encoding="utf-8")


def test_terms_are_in_order_and_explained_once() -> None:
    terms = re.findall(r"^\| ([^|]+) \| .+ \| .+ \|$", GLOSSARY, flags=re.MULTILINE)[1:]
    assert len(terms) > 40
    assert terms == sorted(set(terms), key=str.lower)


def test_modules_exist() -> None:
    modules = set(re.findall(r"`(ecospa_fx[\w.]*)`", GLOSSARY))
    assert len(modules) > 20
    assert [module for module in modules if find_spec(module) is None] == []
