"""The README: its Python runs, its commands and options exist, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ecospa_fx import cli
from ecospa_fx.axes import registry

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "readme"}
    try:
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), scope)
        assert "mylib.double" in registry.operators()
    finally:
        if "mylib.double" in registry.operators():
            registry.unregister("mylib.double")
    sizes = [sum(p.numel() for p in scope[name].parameters()) for name in ("model", "small")]
    assert sizes[0] - sizes[1] == scope["plan"].removed_parameters > 0
    assert "30.0% of what its couplings hold" in capsys.readouterr().out
    assert (tmp_path / "smaller" / "manifest.json").is_file()


def test_there_are_two_commands_of_one_line() -> None:
    commands = blocks("sh")
    assert len(commands) == 2
    assert all(command.count("\n") == 1 for command in commands)
    assert "python -m ecospa_fx.demo" in commands[0]


def test_the_options_are_those_of_the_command_line() -> None:
    told = set(re.findall(r"--[a-z-]+", README))
    (usage,) = blocks("text")
    known = {option for command in commands() for option in command if option.startswith("--")} - {"--help"}
    assert set(re.findall(r"--[a-z-]+", usage)) == known
    assert known <= told


def commands() -> list[list[str]]:
    """The options of each command."""
    choices = next(action.choices for action in cli.parser()._actions if action.choices is not None)
    assert isinstance(choices, dict)
    return [[option for action in command._actions for option in action.option_strings] for command in choices.values()]


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) > 5
    assert not [link for link in links if not (ROOT / link).exists()]
