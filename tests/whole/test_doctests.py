"""The examples in docstrings do what they say."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def modules() -> list[str]:
    """Names of the modules whose docstrings have examples; the passes are found below the package."""
    files = [path for folder in ("ecospa_fx", "passes") for path in sorted((ROOT / folder).rglob("*.py"))]
    relative = [path.relative_to(ROOT).with_suffix("") for path in files if ">>> " in path.read_text(encoding="utf-8")]
    names = (".".join(path.parts) for path in relative if path.parts[:2] != ("ecospa_fx", "passes"))
    return [name if name.startswith("ecospa_fx") else f"ecospa_fx.{name}" for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("module", modules())
def test_examples_do_what_they_say(module: str) -> None:
    result = doctest.testmod(import_module(module))
    assert result.failed == 0


def test_the_verbs_have_a_ladder_of_examples() -> None:
    """Three of each at least, of which some run."""
    for module, name in (
        ("api", "detect"), ("api", "shrink"), ("api", "compress"), ("planning", "plan"), ("importance.score", "score"),
        ("inplace.shrink", "shrink_"), ("training.sparse", "SparseTraining"),
    ):  # fmt: skip
        text = getattr(import_module(f"ecospa_fx.{module}"), name).__doc__
        examples = doctest.DocTestParser().get_examples(text)
        assert len(examples) >= 3, name
        assert any(doctest.SKIP not in example.options for example in examples), name
        assert "Raises:" in text, name
