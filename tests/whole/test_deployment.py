"""A shrunk module, as a graph and as the user's own, in the formats of deployment: the same numbers."""

from __future__ import annotations

import functools
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from tests.support.hugging import tiny
from tests.support.inplace import half, largest, plan_of

UNOPTIMISED = {"aot_inductor.debug_compile": True, "aot_inductor.precompile_headers": False}
"""How C++ is compiled: what is run once pays for no optimiser, and for no headers compiled ahead."""


class Logits(nn.Module):
    """A model of transformers as a function of one tensor: exporters return tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return out


class Both(nn.Module):
    """What both forms compute, one after the other."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.stack([self.first(input_ids), self.second(input_ids)])


@functools.cache
def small(form: str) -> tuple[nn.Module, tuple[Tensor]]:
    """A LLaMA in float32 with half of its FFN units and heads; form: "graph" or "module". No test changes it."""
    model, kwargs = tiny("llama", num_hidden_layers=1)
    model = model.float()
    plan = plan_of(eco.detect(model, (), kwargs), ["ffn", "heads"], half)
    made = eco.shrink(model, plan, (), kwargs) if form == "graph" else eco.shrink_(model, plan, (), kwargs)
    return Logits(made).eval(), (kwargs["input_ids"],)


def dynamic() -> Any:
    return ({0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=60)},)


def check_numbers(run: Any, model: nn.Module, args: tuple[Tensor]) -> None:
    """The same numbers for the example and for another batch and length."""
    with torch.no_grad():
        for ids in (args[0], torch.randint(3, 61, (3, 5))):
            assert largest(run(ids), model(ids)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("form", ["graph", "module"])
def test_export_and_save(form: str, tmp_path: Path) -> None:
    model, args = small(form)
    exported = torch.export.export(model, args, dynamic_shapes=dynamic())
    torch.export.save(exported, tmp_path / "small.pt2")
    loaded = torch.export.load(tmp_path / "small.pt2")
    assert sum(t.numel() for t in loaded.state_dict.values()) == sum(t.numel() for t in model.state_dict().values())
    check_numbers(loaded.module(), model, args)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 crashes when it loads the package")
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="AOTInductor compiles C++: install a compiler"
)
def test_ahead_of_time(tmp_path: Path) -> None:
    """Both forms in one, since a compiler of C++ takes as long for one as for two."""
    (graph, args), (module, _) = small("graph"), small("module")
    model = Both(graph, module).eval()
    exported = torch.export.export(model, args, dynamic_shapes=dynamic())
    path = str(tmp_path / "small.pt2")
    package = torch._inductor.aoti_compile_and_package(exported, package_path=path, inductor_configs=UNOPTIMISED)
    check_numbers(torch._inductor.aoti_load_package(package), model, args)


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="ONNX needs packages: pip install onnx onnxscript onnxruntime",
)
@pytest.mark.parametrize("form", ["graph", "module"])
def test_onnx(form: str, tmp_path: Path) -> None:
    import onnxruntime

    model, args = small(form)
    path = tmp_path / "small.onnx"
    torch.onnx.export(model, args, path, dynamo=True, dynamic_shapes=dynamic(), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (i.name for i in session.get_inputs())
    check_numbers(lambda ids: torch.from_numpy(session.run(None, {name: ids.numpy()})[0]), model, args)
