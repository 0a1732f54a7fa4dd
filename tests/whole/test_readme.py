"""The README and docs: their Python runs, commands and options exist, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ecospa_fx.axes import registry
from ecospa_fx.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.usefixtures("shallow")
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


@pytest.mark.slow
@pytest.mark.usefixtures("shallow")
def test_the_order_with_other_tools_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "order"}
    text = (ROOT / "docs" / "order.md").read_text(encoding="utf-8")
    try:
        for block in blocks("python", text):
            exec(compile(block, "order.md", "exec"), scope)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        torch._dynamo.reset()
    dense, small, own = (sum(p.numel() for p in scope[name].parameters()) for name in ("model", "small", "adapted"))
    assert dense > own
    assert dense - small == scope["plan"].removed_parameters
    assert len(scope["ranks"]) == len(scope["model"].layers)
    assert all(c.blocked is None for c in scope["ranks"])
    assert (tmp_path / "small.pt2").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_models_without_a_loss_compress() -> None:
    scope: dict[str, Any] = {"__name__": "no_loss"}
    for block in blocks("python", (ROOT / "docs" / "no_loss.md").read_text(encoding="utf-8")):
        exec(compile(block, "no_loss.md", "exec"), scope)
    dense, small = (sum(p.numel() for p in scope[name].parameters()) for name in ("encoder", "small"))
    assert dense > small
    pooled = scope["Embedding"](lambda input_ids, attention_mask: SimpleNamespace(last_hidden_state=input_ids))
    assert pooled(torch.ones(2, 3, 4), torch.ones(2, 3)).norm(dim=-1).allclose(torch.ones(2))


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
