"""The reference pages that follow from the code: public names, options, the command line, refusals, models tried."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import pairwise

import ecospa_fx
import ecospa_fx.passes
from ecospa_fx.axes import registry
from ecospa_fx.cli import main as cli
from tests.support.pages import ROOT

MADE = "<!-- Made from the code: python -m tests.whole.test_reference -->\n\n"
OPTIONS = {
    "ecospa_fx.coupling.choice.ChoiceOptions": "Which couplings may lose units: `plan`, `compress`, `SparseTraining`",
    "ecospa_fx.budget.settings.PlanOptions": "What a ratio counts, and how it is spread: `plan`",
    "ecospa_fx.budget.settings.AllPlanOptions": "Further options of `plan`",
    "ecospa_fx.compression.CompressOptions": "`compress` and `compress_`",
    "ecospa_fx.training.settings.TrainingOptions": "`SparseTraining`",
}
"""Classes whose fields are options, by path, with their headings."""


def defined(name: str) -> str:
    """The path of a public name."""
    return f"ecospa_fx.{vars(ecospa_fx)['_MODULES'][name]}.{name}"


def summary(value: object) -> str:
    """The first sentence of a docstring."""
    return " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split())


def python() -> str:
    """Every public name: a table to read, and where the site puts their docstrings."""
    names = sorted(vars(ecospa_fx)["_MODULES"], key=str.lower)
    rows = [f"| `{name}` | {summary(getattr(ecospa_fx, name))} |" for name in names]
    passes = [name for name in vars(ecospa_fx.passes)["_MEMBERS"] if not name.isupper()]
    rows += [f"| `passes.{name}` | {summary(getattr(ecospa_fx.passes, name))} |" for name in sorted(passes)]
    entries = [f"::: {defined(name)}\n" for name in names]
    entries += ["::: ecospa_fx.verify\n    options: {heading_level: 2, show_root_full_path: true}\n"]
    intro = "Docstrings say shapes, units, defaults and errors; `help(ecospa_fx.plan)` shows them too.\n\n"
    return f"# Python\n\n{MADE}{intro}| name | what it is |\n|---|---|\n" + "\n".join([*rows, "", *entries])


def fields(path: str) -> Iterator[tuple[str, str, str]]:
    """(name, type, docstring) of the fields of a class."""
    module, _, name = path.rpartition(".")
    tree = ast.parse(inspect.getsource(import_module(module)))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name).body
    for node, after in pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            yield ast.unparse(node.target), ast.unparse(node.annotation), " ".join(str(after.value.value).split())


def options() -> str:
    """Every option with its type and default."""
    parts = [
        f"## {heading}\n\n" + "\n".join(f"- **`{name}`**: `{kind}`. {text}" for name, kind, text in fields(path))
        for path, heading in OPTIONS.items()
    ]
    return (
        f"# Options\n\n{MADE}Arguments that stand in a verb's signature are in its docstring.\n\n"
        + "\n\n".join(parts)
        + "\n"
    )


def commands() -> dict[str, argparse.ArgumentParser]:
    """The commands by name."""
    action = next(a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def command_line() -> str:
    """The help of every command. Wants COLUMNS=80."""
    parts = [f"## {name}\n\n```text\n{command.format_help().rstrip()}\n```\n" for name, command in commands().items()]
    intro = (
        "`ecospa-fx COMMAND`, or `python -m ecospa_fx COMMAND`. The exit status is 0 where it was done, 2 where it\n"
        "was refused, after one sentence on stderr, and 130 if interrupted. What is refused changes nothing.\n\n"
    )
    return f"# Command line\n\n{MADE}{intro}" + "\n".join(parts)


def refusals() -> str:
    """Operators that block on purpose."""
    by_reason: dict[str, list[str]] = {}
    for operator, reason in registry.refused().items():
        by_reason.setdefault(reason, []).append(f"`{operator}`")
    parts = [f"- {', '.join(sorted(names))}: {reason}." for reason, names in sorted(by_reason.items())]
    return "\n".join(parts) + "\n"


def coverage() -> str:
    """What `benchmarks/zoo.py` measured."""
    zoo = json.loads((ROOT / "benchmarks" / "results" / "zoo.json").read_text(encoding="utf-8"))
    rows = [
        f"| {m['model']} | {m['offered']} | {m['blocked']} | {'yes' if m['exact'] else 'no'} | {m['error']:.0e} |"
        for m in zoo["models"]
    ]
    intro = (
        f"{len(rows)} tiny architectures of transformers and by hand (torch {zoo['torch']}): couplings that are\n"
        "offered and blocked, and whether what is left equals masking.\n"
        "[Made](../../benchmarks/README.md#the-zoo-and-random-graphs) by `python benchmarks/zoo.py`.\n\n"
    )
    header = "| model | offered | blocked | exact | largest relative error |\n|---|---|---|---|---|\n"
    return f"# Models that were tried\n\n{MADE}{intro}{header}" + "\n".join(rows) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "python": python, "options": options, "command-line": command_line, "coverage": coverage,
}  # fmt: skip
"""Pages of docs/reference by name."""

LIST = re.compile(r"(?<=<!-- made -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)
"""What is made in a page that people write."""
