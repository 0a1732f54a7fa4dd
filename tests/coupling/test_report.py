"""The table and its folding, the evidence of one coupling, and the JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.report import coupling_table, couplings_data, couplings_json, covered_parameters, explain
from ecospa_fx.coupling.types import Coupling, Refusal
from tests.support.tiny import box, coupling, ffn_coupling, member, tiny, tiny_couplings

MODEL = tiny(3)
COUPLINGS = tiny_couplings(MODEL)


def ffn(layer: str, parameters: int = 26) -> Coupling:
    """A small coupling of the given layer."""
    made = coupling("x:ffn", [member("layers.0.ffn.down.bias", 0, "producer", [box()], 1, 8)], parameters)
    return replace(made, name=f"{layer}:ffn", layer=layer)


def layers(found: Sequence[Coupling]) -> list[str]:
    """The first column of the table's rows, and the parameters."""
    lines = coupling_table(Couplings(found, MODEL)).splitlines()[2:-1]
    return [line.split("  ")[0] for line in lines]


# -- the table -----------------------------------------------------------------------------------------------------


def test_the_table_of_a_model() -> None:
    assert str(COUPLINGS).splitlines() == [
        "layer                    kind       units × carriers  symmetry       parameters  blocked because",
        "-----------------------  -------  ------------------  -----------  ------------  "
        "-------------------------------------",
        "layers.{0..2}.attention  qk                    2 × 2  rotary            3 × 216",
        "layers.{0..2}.attention  vo                    4 × 2  linear            3 × 200",
        "layers.{0..2}.attention  heads                 2 × 1  permutation       3 × 416",
        "layers.{0..2}.ffn        ffn                  12 × 1  permutation       3 × 312",
        "layers.{0..2}.experts    experts               6 × 2  permutation       3 × 192",
        "(root)                   hidden                8 × 1  permutation            88  "
        "aten.layer_norm.default at layer_norm",
        "15 couplings offered, 1 blocked, 2,760 of 2,920 parameters covered (94.5%)",
    ]
    assert coupling_table(COUPLINGS) == str(COUPLINGS)


def test_covered_parameters_count_each_element_once() -> None:
    """Whole heads hold the elements of their dims, and a refusal covers nothing."""
    assert covered_parameters(COUPLINGS) == 3 * (416 + 312 + 192)
    assert covered_parameters(tiny_couplings(MODEL, heads=False)) == 3 * (416 + 312 + 192)


def test_folds_runs_of_equal_layers_only() -> None:
    assert layers([ffn(f"h.{i}") for i in (0, 1, 2, 4, 5, 7)]) == ["h.{0..2}", "h.{4..5}", "h.7"]
    assert layers([ffn(f"h.{i}", 26 + (i == 1)) for i in range(3)]) == ["h.0", "h.2", "h.1"]
    assert layers([ffn("a.0"), ffn("b.1"), ffn("2"), ffn("x3.y4")]) == ["a.0", "b.1", "2", "x3.y4"]


def test_folds_two_numbers_where_they_fill_a_rectangle() -> None:
    grid = [ffn(f"h.{i}.experts.{j}.mlp") for i in range(3) for j in range(4)]
    assert layers(grid) == ["h.{0..2}.experts.{0..3}.mlp"]
    assert layers(grid[:-1]) == ["h.{0..1}.experts.{0..3}.mlp", "h.2.experts.{0..2}.mlp"]
    assert layers(grid[1:]) == ["h.0.experts.{1..3}.mlp", "h.{1..2}.experts.{0..3}.mlp"]


def test_like_couplings_of_one_layer_stay_apart() -> None:
    twice = [replace(ffn(f"h.{i}"), name=f"h.{i}:{n}") for i in range(3) for n in "ab"]
    assert layers(twice) == ["h.{0..2}", "h.{0..2}"]
    assert coupling_table(Couplings(twice, MODEL)).count("3 × 26") == 2


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), unique=True))
def test_folding_loses_no_layer(numbers: list[tuple[int, int]]) -> None:
    found = [ffn(f"h.{i}.experts.{j}") for i, j in numbers]
    unfolded: list[tuple[int, int]] = []
    for name in layers(found) if found else []:
        spans = [part.strip("{}").split("..") for part in name.split(".experts.")[0:2]]
        (a, b), (c, d) = ((int(s[0].removeprefix("h.").strip("{")), int(s[-1].split(".")[-1])) for s in spans)
        unfolded += [(i, j) for i in range(a, b + 1) for j in range(c, d + 1)]
    assert sorted(unfolded) == sorted(numbers)


def test_refusals_fold_by_operator_and_name_the_first_and_last_node() -> None:
    refused = [
        replace(
            ffn(f"h.{i}"), blocked=Refusal("no rule", f"sort_{i}", "aten.cumsum.default" if i == 3 else "aten.sort")
        )
        for i in range(4)
    ]
    rows = coupling_table(Couplings(refused, MODEL)).splitlines()[2:]
    assert rows[0].endswith("aten.sort at sort_0 … sort_2")
    assert rows[1].endswith("aten.cumsum.default at sort_3")
    assert rows[2] == "0 couplings offered, 4 blocked, 0 of 2,920 parameters covered (0.0%)"


def test_no_coupling_at_all() -> None:
    assert str(Couplings([], MODEL)) == "No coupling was found, and none was refused."


# -- the evidence ----------------------------------------------------------------------------------------------------


def test_explains_an_offer_node_by_node() -> None:
    assert explain(ffn_coupling("layers.0")).splitlines() == [
        "layers.0.ffn:ffn: ffn of layers.0.ffn, 12 units × 1 carrier, symmetry permutation, 312 parameters",
        "path",
        "   1. linear_4: aten.linear.default creates in layers.0.ffn.fused",
        "       gate, up = self.fused(x).chunk(2, -1)",
        "   2. mul_3: aten.mul.Tensor passes in layers.0.ffn",
        "       hidden = silu(gate) * up",
        "   3. linear_5: aten.linear.default contracts in layers.0.ffn.down",
        "members",
        "  layers.0.ffn.fused.weight  axis 0  producer  from 0, units by 1 and from 12, units by 1",
        "  layers.0.ffn.fused.bias    axis 0  producer  from 0, units by 1 and from 12, units by 1",
        "  layers.0.ffn.down.weight   axis 1  consumer  from 0, units by 1",
    ]


def test_explains_carriers_widths_and_contents() -> None:
    text = explain(COUPLINGS["layers.0.attention:qk"])
    assert (
        "layers.0.attention.q.weight  axis 0  producer  from 0, units by 1, carriers 2 by 8, width 2 by 4 · 2 by 2"
        in text
    )
    assert "axis 2  producer  from 0, units by 1, in each slice of axis 0" in explain(
        COUPLINGS["layers.0.experts:experts"]
    )
    assert explain(COUPLINGS["layers.0.attention:heads"]).splitlines()[-3:] == [
        "contains",
        "  layers.0.attention:qk",
        "  layers.0.attention:vo",
    ]


def test_explains_a_refusal() -> None:
    assert explain(COUPLINGS[":hidden"]).splitlines() == [
        ":hidden: hidden of the root, 8 units × 1 carrier, symmetry permutation, 88 parameters",
        "blocked: layer_norm takes statistics over this dim, so dropping an element changes the others",
        "  by aten.layer_norm.default at layer_norm",
        "    x = x + self.attention(self.norm(x))",
        "members",
        "  embed.weight  axis 1  producer  from 0, units by 1",
    ]


def test_explains_a_refusal_without_members_or_source() -> None:
    bare = replace(COUPLINGS[":hidden"], members=(), blocked=Refusal("no rule", "sort", "aten.sort"))
    assert explain(bare).splitlines()[1:] == ["blocked: no rule", "  by aten.sort at sort"]


def test_source_lines_keep_their_own_indentation() -> None:
    shown = replace(COUPLINGS[":hidden"], members=(), blocked=Refusal("m", "n", "o", "    if a:\n        b(a)\n"))
    assert explain(shown).splitlines()[-2:] == ["    if a:", "        b(a)"]


# -- for machines ----------------------------------------------------------------------------------------------------


def test_json_holds_everything_that_the_table_shows() -> None:
    data = json.loads(couplings_json(COUPLINGS))
    assert {k: data[k] for k in ("format", "version", "parameters", "covered")} == {
        "format": "ecospa-fx-couplings",
        "version": 1,
        "parameters": 2920,
        "covered": 2760,
    }
    assert [c["name"] for c in data["couplings"]] == [c.name for c in COUPLINGS]
    vo = data["couplings"][1]
    assert {k: vo[k] for k in vo if k != "members"} == {
        "name": "layers.0.attention:vo",
        "kind": "vo",
        "layer": "layers.0.attention",
        "size": 4,
        "carriers": 2,
        "symmetry": "linear",
        "parameters": 200,
        "blocked": None,
        "contains": [],
    }
    assert vo["members"][2] == {
        "parameter": "layers.0.attention.o.weight",
        "axis": 1,
        "role": "consumer",
        "carrier_axis": None,
        "boxes": [{"offset": 0, "carriers": [[2, 8]], "unit": 1, "width": [[2, 4]]}],
        "carriers": 2,
        "units": 4,
    }
    assert data["couplings"][-1]["blocked"] == {
        "message": "layer_norm takes statistics over this dim, so dropping an element changes the others",
        "node": "layer_norm",
        "operator": "aten.layer_norm.default",
        "source": "x = x + self.attention(self.norm(x))",
        "remedy": "",
    }


def test_the_data_are_the_json() -> None:
    assert json.loads(json.dumps(couplings_data(COUPLINGS))) == json.loads(couplings_json(COUPLINGS))
