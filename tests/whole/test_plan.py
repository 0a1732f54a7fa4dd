"""Plans as data: masks, JSON, tables, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.types import Box, Member
from ecospa_fx.errors import PlanError
from ecospa_fx.plan import FORMAT, Plan, Selection
from ecospa_fx.planning import plan
from tests.support.tiny import FFN, Tiny, box, coupling, member, tiny, tiny_couplings

MODEL = tiny()
COUPLINGS = tiny_couplings(MODEL)
MADE = plan(COUPLINGS, 0.5, "random", seed=7)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any choice of couplings and units, equally many per carrier, whether an allocation would make it or not."""
    chosen = draw(st.lists(st.sampled_from(COUPLINGS.offered), unique_by=lambda c: c.name))
    selections = []
    for c in chosen:
        kept = draw(st.integers(1, c.size))
        one = st.lists(st.integers(0, c.size - 1), min_size=kept, max_size=kept, unique=True).map(sorted).map(tuple)
        keep = draw(st.tuples(*[one] * c.carriers))
        selections.append(Selection(c.name, c.kind, c.layer, c.size, c.carriers, c.members, keep))
    return Plan(tuple(selections), tuple(COUPLINGS.shapes.items()))


# -- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(plans())
def test_masks_hold_what_every_selection_keeps(made: Plan) -> None:
    want = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in MODEL.named_parameters()}
    for s in made:
        for m in s.members:
            for c, units in enumerate(s.keep):
                gone = m.indices[c, [u for u in range(s.size) if u not in units]].flatten()
                at = torch.zeros(want[m.parameter].shape[m.axis], dtype=torch.bool).index_fill_(0, gone, True)
                view = [-1 if axis == m.axis else 1 for axis in range(want[m.parameter].dim())]
                part = want[m.parameter] if m.carrier_axis is None else want[m.parameter].narrow(m.carrier_axis, c, 1)
                part &= ~at.view(view)
    masks = made.masks(MODEL)
    assert {n for n, mask in want.items() if not mask.all()} == set(masks)
    for name, mask in masks.items():
        assert mask.dtype is torch.bool
        assert torch.equal(mask, want[name])
    assert made.removed_parameters == sum(int((~m).sum()) for m in want.values())


@settings(max_examples=80, deadline=None)
@given(plans())
def test_json_gives_back_an_equal_plan(made: Plan) -> None:
    again = Plan.from_json(made.to_json())
    assert again == made
    assert hash(again) == hash(made)
    assert again.to_json() == made.to_json()
    assert Plan.from_json(made.to_json().encode()) == made


def test_masked_units_are_the_ones_named() -> None:
    """One KV head's dims, one rotary pair, and one FFN neuron of the fused weight."""
    kept: dict[str, tuple[tuple[int, ...], ...]] = {
        "layers.0.attention:vo": ((1, 2), (0, 3)),
        "layers.0.attention:qk": ((1,), (0,)),
        "layers.1.ffn:ffn": (tuple(range(1, FFN)),),
    }
    chosen = [replace(s, keep=kept[s.name]) for s in MADE if s.name in kept]
    masks = Plan(tuple(chosen), MADE.shapes).masks(MODEL)

    def gone(name: str, axis: int = 0) -> list[int]:
        mask = masks[name].transpose(0, axis)
        return [i for i in range(mask.shape[0]) if not mask[i].any()]

    assert gone("layers.0.attention.v.bias") == [0, 3, 5, 6]
    assert gone("layers.0.attention.o.weight", 1) == [0, 3, 4, 7, 9, 10, 13, 14]
    assert gone("layers.0.attention.k.weight") == [0, 2, 5, 7]
    assert gone("layers.0.attention.q.weight") == [0, 2, 4, 6, 9, 11, 13, 15]
    assert gone("layers.1.ffn.fused.weight") == [0, FFN]
    assert gone("layers.1.ffn.down.weight", 1) == [0]


def test_masks_leave_the_model_alone_and_work_on_meta() -> None:
    before = {n: p.detach().clone() for n, p in MODEL.named_parameters()}
    masks = MADE.masks(MODEL)
    assert all(torch.equal(before[n], p) for n, p in MODEL.named_parameters())
    with torch.device("meta"):
        shadow = tiny()
    found = MADE.masks(shadow)
    assert {n: m.device.type for n, m in found.items()} == dict.fromkeys(masks, "cpu")
    assert all(torch.equal(mask, masks[n]) for n, mask in found.items())


def test_overlapping_selections_count_each_element_once() -> None:
    """Half of the heads and half of every head's value dims: three quarters of the values go."""
    heads, vo = (MADE[f"layers.0.attention:{kind}"] for kind in ("heads", "vo"))
    chosen = (replace(heads, keep=((0,),)), replace(vo, keep=((0, 1), (0, 1))))
    made = Plan(chosen, MADE.shapes)
    masks = made.masks(MODEL)
    assert int(masks["layers.0.attention.v.bias"].sum()) == 2
    assert made.removed_parameters == sum(int((~m).sum()) for m in masks.values())
    held = sum(COUPLINGS[f"layers.0.attention:{kind}"].parameters for kind in ("qk", "vo"))
    assert made.coupled_parameters == held


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (
            tiny(1),
            "the plan was made for another model: parameter 'layers.1.attention.q.weight' is of shape (16, 8) in the "
            "plan and absent in the model; detect and plan again on this one",
        ),
        (
            tiny(3),
            "the plan was made for another model: parameter 'layers.2.attention.q.weight' is absent in the plan and "
            "of shape (16, 8) in the model; detect and plan again on this one",
        ),
    ],
)
def test_refuses_another_model(other: Tiny, text: str) -> None:
    with pytest.raises(PlanError) as error:
        MADE.masks(other)
    assert str(error.value) == text


# -- what a selection and a plan must be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        (((0, 1),), "lists kept units for 1 carriers and has 2"),
        (((), ()), "keeps no unit at all"),
        (((0, 4), (0, 1)), "keeps units that are not ascending numbers below 4"),
        (((1, 0), (0, 1)), "keeps units that are not ascending numbers below 4"),
        (((1, 1), (0, 1)), "keeps units that are not ascending numbers below 4"),
        (((-1, 0), (0, 1)), "keeps units that are not ascending numbers below 4"),
    ],
)
def test_refuses_selections(keep: tuple[tuple[int, ...], ...], text: str) -> None:
    with pytest.raises(PlanError) as error:
        replace(MADE["layers.0.attention:vo"], keep=keep)
    assert str(error.value) == f"the selection of coupling 'layers.0.attention:vo' {text}: make the plan anew"


def test_refuses_a_coupling_twice() -> None:
    with pytest.raises(PlanError) as error:
        Plan((MADE.selections[0],) * 2, MADE.shapes)
    assert str(error.value) == "coupling 'layers.0.attention:qk' is selected twice: make the plan anew"


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (member("head.weight", 0, "producer", [box()], 1, 4), "names axes [0] of parameter 'head.weight', which is ab"),
        (member("layers.0.ffn.down.bias", 1, "producer", [box()], 1, 4), "names axes [1] of parameter 'layers.0.ffn."),
        (member("layers.0.ffn.down.bias", 0, "producer", [box(6)], 1, 4), "has positions outside parameter 'layers.0"),
        (member("layers.0.ffn.down.bias", 0, "producer", [box(-1)], 1, 4), "has positions outside parameter 'layers."),
        (
            member("layers.0.ffn.down.bias", 0, "producer", [Box(0, (), 1, ((3, 1),))], 1, 4),
            "has positions outside parameter 'layers.0.ffn.down.bias' of shape (8,): make the plan anew",
        ),
        (Member("layers.0.experts.up", 2, "producer", 2, (box(),), 1, 4), "names axes [2, 2] of parameter 'layers.0.e"),
        (Member("layers.0.experts.up", 2, "producer", 0, (box(),), 1, 4), "has positions outside parameter 'layers.0."),
    ],
)
def test_refuses_members_outside_their_parameter(bad: Member, text: str) -> None:
    with pytest.raises(PlanError) as error:
        Plan((Selection("a:ffn", "ffn", "a", 4, 1, (bad,), ((0,),)),), MADE.shapes)
    assert str(error.value).startswith(f"coupling 'a:ffn' {text}")


def test_is_a_collection_of_selections() -> None:
    assert len(MADE) == len(COUPLINGS.offered)
    assert [s.name for s in MADE] == [c.name for c in COUPLINGS.offered]
    assert MADE["layers.1.ffn:ffn"].kind == "ffn"
    with pytest.raises(KeyError, match=r"the plan has no selection of coupling 'layers\.9:ffn'"):
        MADE["layers.9:ffn"]


# -- JSON that is not a plan -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "this is not a readable plan: Expecting value"),
        ("[" * 100_000, "this is not a readable plan: "),
        (b"\xff", "this is not a readable plan: "),
        ("[]", "this is not a plan: its format is not 'ecospa-fx-plan'; pass what Plan.to_json returned"),
        ('{"format": "other"}', "this is not a plan: its format is not 'ecospa-fx-plan'; pass what Plan.to_json retur"),
        (
            json.dumps({"format": FORMAT, "version": 9}),
            "the plan has format version 9 and this library reads version 1: read it with the version of ecospa_fx "
            "that wrote it",
        ),
        (
            json.dumps({"format": FORMAT, "version": 1}),
            "this is not a readable plan: field 'shapes' is missing; save the plan again",
        ),
    ],
)
def test_refuses_texts(text: str | bytes, told: str) -> None:
    with pytest.raises(PlanError) as error:
        Plan.from_json(text)
    assert str(error.value).startswith(told)


def _set(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["selections"][0].update(fields)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_set(size="4"), "this is not a readable plan: '4' stands where a whole number belongs; save the plan again"),
        (_set(size=True), "this is not a readable plan: True stands where a whole number belongs; save the plan again"),
        (_set(kind=None), "this is not a readable plan: None stands where a text belongs; save the plan again"),
        (_set(keep=0), "this is not a readable plan: 0 stands where a list belongs; save the plan again"),
        (_set(members=[1]), "this is not a readable plan: 1 stands where an object belongs; save the plan again"),
        (_set(keep=[[0], [9]]), "the selection of coupling 'layers.0.attention:qk' keeps units that are not ascending"),
        (lambda data: data["selections"][0]["members"][0].update(role="both"), "this is not a readable plan: 'both' "),
        (lambda data: data["selections"][0].pop("layer"), "this is not a readable plan: field 'layer' is missing; "),
        (
            lambda data: data["selections"][0]["members"][0]["boxes"][0].update(width=[[1, 2, 3]]),
            "this is not a readable plan: [1, 2, 3] stands where a list of 2 belongs",
        ),
    ],
)
def test_refuses_spoiled_fields(spoil: Callable[[dict[str, Any]], None], told: str) -> None:
    data = json.loads(MADE.to_json())
    spoil(data)
    with pytest.raises(PlanError) as error:
        Plan.from_json(json.dumps(data))
    assert str(error.value).startswith(told)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_spoiled_value_anywhere_is_a_plan_error_or_a_plan(data: st.DataObject) -> None:
    """Whatever stands where, nothing but a PlanError of one line comes out, or a plan that holds."""
    made = json.loads(MADE.to_json())
    at: Any = made
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not at[key] or not isinstance(at[key], dict | list) or data.draw(st.integers(0, 5)) == 0:
            break
        at = at[key]
    at[key] = data.draw(st.sampled_from([None, -1, 0, 3, 10**6, 1.5, "x", [], {}, [[]], [1, 2], True]))
    told, read = "", None
    try:
        read = Plan.from_json(json.dumps(made))
    except PlanError as error:
        told = str(error)
    assert "\n" not in told
    assert read is None or Plan.from_json(read.to_json()) == read


# -- printing --------------------------------------------------------------------------------------------------------


def test_prints_a_table() -> None:
    names = {"layers.0.attention:vo": ((1, 2), (0, 3)), "layers.1.ffn:ffn": (tuple(range(3)),)}
    made = Plan(tuple(replace(s, keep=names[s.name]) for s in MADE if s.name in names), MADE.shapes)
    assert str(made).splitlines() == [
        "layer               kind      units kept × carriers    parameters removed",
        "------------------  ------  -----------------------  --------------------",
        "layers.0.attention  vo                      2/4 × 2                   100",
        "layers.1.ffn        ffn                        3/12                   234",
        "total                                                                 334",
        "removes 334 of 1,976 parameters (16.9%), 65.2% of what its couplings hold",
    ]
    assert repr(made) == (
        "Plan(2 couplings, removes 334 of 1,976 parameters (16.9%), 65.2% of what its couplings hold)"
    )


def test_prints_an_empty_plan() -> None:
    empty = Plan.keeping(COUPLINGS, {})
    assert str(empty) == "An empty plan: nothing is removed."
    assert empty.masks(MODEL) == {}
    assert Plan.from_json(empty.to_json()) == empty


def test_a_coupling_that_keeps_all_removes_nothing() -> None:
    whole = coupling("layers.0.ffn:ffn", COUPLINGS["layers.0.ffn:ffn"].members, 312)
    made = plan(Couplings([whole], MODEL), 0.01, "magnitude")
    assert made["layers.0.ffn:ffn"].kept == FFN
    assert (made.removed_parameters, made.masks(MODEL)) == (0, {})
