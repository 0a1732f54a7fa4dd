"""What holds for every pass, and the runner that checks what passes leave behind."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor, fx, nn

import ecospa_fx as eco
import ecospa_fx.passes
from ecospa_fx.errors import CaptureError, PassError
from ecospa_fx.ir.passes import CallablePass
from ecospa_fx.passes import CLEANUP, Pass, PassResult, ShrinkCouplings, run_passes
from ecospa_fx.passes.canonicalise import CANONICALISE
from tests.support.attention import traced

FOLDER = Path(ecospa_fx.passes.__file__).resolve().parent
TESTS = Path(__file__).resolve().parent
FOUR = ("test_golden", "test_twin", "test_equal", "test_again")


def registered() -> list[type[Any]]:
    """Every pass that the package offers."""
    members = [getattr(ecospa_fx.passes, name) for name in vars(ecospa_fx.passes)["_MEMBERS"]]
    return [c for c in members if isinstance(c, type) and is_dataclass(c) and hasattr(c, "run")]


def files(folder: str) -> list[str]:
    """The modules of a folder of passes."""
    return sorted(path.stem for path in (FOLDER / folder).glob("[a-z]*.py"))


def modules(passes: Sequence[type[Any]]) -> list[str]:
    """The files in which passes are defined."""
    return sorted(c.__module__.rpartition(".")[2] for c in passes)


def missing_tests(module: str, folder: Path) -> list[str]:
    """Which of the four tests a pass lacks."""
    file = folder / f"test_pass_{module}.py"
    if not file.exists():
        return list(FOUR)
    names = [n.name for n in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)]
    return [kind for kind in FOUR if not any(n.startswith(kind) for n in names)]


def test_every_pass_has_its_four_tests(tmp_path: Path) -> None:
    names = modules(registered())
    assert names == sorted(["shrink_couplings", *files("cleanup")])
    assert {m: missing_tests(m, TESTS) for m in names} == {m: [] for m in names}
    (tmp_path / "test_pass_half.py").write_text("def test_golden_x(): ...\ndef test_again(): ...\n")
    assert missing_tests("half", tmp_path) == ["test_twin", "test_equal"]
    assert missing_tests("none", tmp_path) == list(FOUR)


def test_every_pass_is_a_frozen_dataclass_named_after_its_file() -> None:
    for kind in [*registered(), *(type(p) for p in CANONICALISE)]:
        assert vars(kind)["__dataclass_params__"].frozen
        assert kind.name == kind.__module__.rpartition(".")[2].replace("_", "-")
        assert kind.__doc__


def test_every_canonicalisation_runs_once() -> None:
    assert modules([type(p) for p in CANONICALISE]) == files("canonicalise")


def test_what_editors_see_of_the_passes_is_what_is_there() -> None:
    stub = ast.parse((FOLDER / "__init__.pyi").read_text())
    shown = {
        (alias.name, node.module) for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    members = {(name, f"ecospa_fx.{module}") for name, module in vars(ecospa_fx.passes)["_MEMBERS"].items()}
    assert shown == members
    for name, module in members:
        assert getattr(ecospa_fx.passes, name) is getattr(import_module(module), name)
    assert {name for name, _ in members} <= set(dir(ecospa_fx.passes))
    with pytest.raises(AttributeError, match=r"module 'ecospa_fx\.passes' has no attribute 'nothing'"):
        _ = ecospa_fx.passes.nothing  # type: ignore[attr-defined]


# -- the runner ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Broken:
    """Breaks a graph in one of several ways."""

    name: ClassVar[str] = "broken"

    how: str

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        node = next(n for n in graph.nodes if n.op == "call_function" and "sin" in str(n.target))
        if self.how == "order":
            node.prepend(*list(node.users))
        elif self.how == "values":
            del node.meta["val"]
        elif self.how == "refused":
            raise CaptureError("the model does what no graph can do")
        elif self.how == "outputs":
            node.meta["val"] = node.meta["val"].float()
        return PassResult(graph_module, 1, (f"{self.how} noted",))


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "order",
            r"broken \(after causal-attention, .*, equal-widths, remove-inert\) left a graph that is not well",
        ),
        ("values", "left node sin without an example value"),
        ("outputs", "changed the outputs from .*float64.* to .*float32"),
    ],
)
def test_the_runner_names_the_pass_that_breaks_a_graph(how: str, message: str) -> None:
    graph = traced(Sine(), (torch.randn(2, 3).double(),), axes=())
    with pytest.raises(PassError, match=message):
        run_passes(graph, (*CLEANUP, Broken(how)))


def test_what_a_pass_refuses_is_raised_as_it_is() -> None:
    graph = traced(Sine(), (torch.randn(2, 3).double(),), axes=())
    with pytest.raises(CaptureError, match=r"^the model does what no graph can do$"):
        run_passes(graph, (Broken("refused"),))


def test_the_runner_collects_changes_and_reasons() -> None:
    graph = traced(Sine(), (torch.randn(2, 3).double(),), axes=())
    passes: list[Pass] = [Broken("not at all"), Broken("still not")]
    result = run_passes(graph, passes)
    assert (result.changes, result.reasons) == (2, ("not at all noted", "still not noted"))


def test_passes_run_in_the_pass_manager_of_torch() -> None:
    from torch.fx.passes.infra.pass_manager import PassManager

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(3, 4)
    graph_module = torch.export.export(model, (x,)).module()
    plan = eco.plan(eco.detect(graph_module, (x,)), ratio=0.5, scores="magnitude")
    wanted = eco.shrink(model, plan, (x,))(x)
    cleanup: list[Any] = [*CLEANUP]
    result = PassManager([cast("Any", ShrinkCouplings(plan)), *cleanup])(graph_module)
    assert result.modified
    assert result.graph_module.get_parameter("0.weight").shape == (4, 4)
    torch.testing.assert_close(result.graph_module(x), wanted)
    assert not PassManager(cleanup)(result.graph_module).modified


def test_a_pass_that_is_called_is_checked() -> None:
    graph_module = traced(nn.Linear(4, 4), (torch.randn(2, 4),))
    with pytest.raises(PassError, match="pass breaks left node"):
        Breaks()(graph_module)


@dataclass(frozen=True, slots=True)
class Breaks(CallablePass):
    """Leaves a node without a value."""

    name: ClassVar[str] = "breaks"

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        output = graph_module.graph.output_node()
        with graph_module.graph.inserting_before(output):
            node = graph_module.graph.call_function(torch.ops.aten.relu.default, (output.args[0][0],))  # type: ignore[index]
        output.replace_input_with(output.args[0][0], node)  # type: ignore[index,arg-type]
        return PassResult(graph_module, 1)
