"""What the page, the pictures and the node data take from the graph that couplings were detected in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ecospa_fx as eco
from ecospa_fx.budget.allocate import NestedPlans
from ecospa_fx.report import content as contents
from ecospa_fx.report import verb
from ecospa_fx.report.drawing import drawings
from ecospa_fx.report.model_explorer import GRADIENT, REFUSED

RATIOS = (0.25, 0.5)


class Attention(nn.Module):
    """Four heads of four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(8, 16)
        self.o = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(*x.shape[:2], 4, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        out: Tensor = self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention, and a gated feed-forward part; what it returns refuses the width of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        out: Tensor = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return out


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def couplings() -> Any:
    torch.manual_seed(0)
    return eco.detect(Stack().double(), (torch.randn(2, 5, 8).double(),))


@pytest.fixture(scope="module")
def plan(couplings: Any) -> eco.Plan:
    return eco.plan(couplings, 0.5, "magnitude")


@pytest.fixture(scope="module")
def shown(couplings: Any, plan: eco.Plan) -> contents.Content:
    nested = NestedPlans.of(couplings, "magnitude", RATIOS)
    return contents.content(couplings, plan, nested)


def counted(model: nn.Module) -> int:
    """FLOPs of the products of the example call."""
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 5, 8).double())
    return int(counter.get_total_flops())


def test_flops_are_those_of_the_smaller_model(couplings: Any, plan: eco.Plan, shown: contents.Content) -> None:
    small = eco.shrink(couplings.model, plan, (torch.randn(2, 5, 8).double(),))
    assert shown.flops == pytest.approx(counted(small) / counted(couplings.model))
    assert shown.replanning is not None
    assert shown.flops is not None
    assert shown.replanning.flops[1] == pytest.approx(shown.flops)  # the same plan
    assert shown.flops < shown.replanning.flops[0] < 1


def test_ragged_plans_have_no_flops(couplings: Any) -> None:
    vo = next(c for c in couplings.offered if c.kind == "vo")
    ragged = eco.Plan.keeping(couplings, {vo.name: [[0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]})
    shown = contents.content(couplings, ragged, None)
    assert shown.flops is None
    card = next(card for card in shown.cards if card["name"] == vo.name)
    assert (card["kept"], card["units"]) == (15 / 16, (3, 4))


def test_one_drawing_of_layers_alike(couplings: Any, plan: eco.Plan) -> None:
    (drawing,) = drawings(couplings, {})
    assert drawing.title == "layers.{0..1}"
    by_parameter = {line: box for box in drawing.boxes for line in box.lines}
    assert {"attention.q.weight", "attention.o.weight", "up.bias", "down.weight"} <= set(by_parameter)
    assert "down.bias" not in by_parameter  # it belongs to what the block returns
    titles = [box.title for box in drawing.boxes]
    assert titles.count("linear") == 7
    assert titles.count("scaled_dot_product_attention") == 1
    assert len(drawing.arrows) == 8
    assert "silu" in titles
    down, gate = by_parameter["down.weight"], by_parameter["gate.weight"]
    assert gate.x < down.x
    assert by_parameter["down.weight"].lines == ("down.weight", "8 × 12")
    reached = {(a.start, a.kind) for a in drawing.arrows}
    assert ((gate.x + 176, gate.y + gate.height / 2), "ffn") in reached
    assert set(drawing.kinds) == {"qk", "vo", "ffn"}
    assert all(a.start[0] < a.end[0] for a in drawing.arrows)
    places = [(box.x, box.y, box.height) for box in drawing.boxes]
    for x, y, height in places:
        assert 0 <= x <= drawing.width - 176
        assert 0 <= y <= drawing.height - height
        assert not any(x == u and y < v < y + height for u, v, _ in places)
    long = "a_very_long_name_of_a_parameter.weight"
    assert drawing.boxes[0].shown(long) == "…" + long[-24:]
    assert drawing.boxes[0].shown("x" * 25) == "x" * 25


def test_a_layer_of_its_own_shows_both_shapes() -> None:
    mlp = nn.Sequential(nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 4))
    couplings = eco.detect(mlp, (torch.randn(2, 4),))
    (drawing,) = drawings(couplings, {"0.weight": (6, 4)})
    assert drawing.title == "(root)"
    assert [box.lines[:2] for box in drawing.boxes] == [("0.weight", "12 × 4 → 6 × 4"), (), ("2.weight", "4 × 12")]
    assert [(a.start[0] < a.end[0], a.kind) for a in drawing.arrows] == [(True, "ffn")] * 2
    assert drawing.arrows[0].curve.startswith("M188,")


def test_node_data_of_model_explorer(couplings: Any, plan: eco.Plan, tmp_path: Path) -> None:
    data = json.loads(eco.report(couplings, plan=plan, path=tmp_path / "nodes.json").read_text())
    assert set(data) == {"name", "results", "gradient"}
    assert data["gradient"] == GRADIENT
    program = torch.export.export(couplings.model, couplings.example[0], strict=False)
    names = {node.name for node in program.graph.nodes}
    results = data["results"]
    assert "p_layers_0_gate_weight" in results
    assert len(set(results) - names) <= 0.2 * len(results)
    ffn = plan["layers.0.ffn"]
    assert results["p_layers_0_gate_weight"] == {"value": round(ffn.kept / ffn.size, 4)}
    refusal = couplings.blocked[0].blocked
    assert results[refusal.node]["bgColor"] == REFUSED
    whole = json.loads(eco.report(couplings, path=tmp_path / "nodes.json").read_text())
    assert {r["value"] for r in whole["results"].values()} == {1.0}


@pytest.mark.slow
def test_pictures(couplings: Any, plan: eco.Plan, tmp_path: Path) -> None:
    with mock.patch.object(verb, "PERCENTS", RATIOS):
        png = eco.report(couplings, plan=plan, scores="magnitude", path=tmp_path / "a.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    svg = eco.report(couplings, plan=plan, path=tmp_path / "a.svg").read_text()
    assert svg.startswith("<svg")
    for text in ("layers.0", "qk", "units kept", "FLOPs left, of the narrowed products"):
        assert f">{text}</text>" in svg
    kept = plan["layers.0.ffn"].kept / plan["layers.0.ffn"].size
    assert f">{100 * kept:.0f}%</text>" in svg
