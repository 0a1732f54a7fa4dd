"""Parts of a model that cannot be exported whole: found, shrunk and put back, equal to masking of the whole model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.errors import CaptureError, InputError, OptionError, PlanError, ScoreError, StorageError
from ecospa_fx.importance.score import Batch
from ecospa_fx.origin import ATTRIBUTE, origin_of
from ecospa_fx.verify import masked, masked_error
from tests.support.seeing import Block, Language, Seeing, call, loss, seeing

BOTH = ("language", "sight.features")


@pytest.fixture(scope="module")
def model() -> Seeing:
    return seeing()


@pytest.fixture(scope="module")
def couplings(model: Seeing) -> Couplings:
    return eco.detect(model, call(), part=BOTH)


@pytest.fixture(scope="module")
def plan(couplings: Couplings) -> eco.Plan:
    return eco.plan(couplings, 0.4, "random", exclude="language.blocks.1")


@pytest.fixture(scope="module")
def small(model: Seeing, plan: eco.Plan) -> nn.Module:
    return eco.shrink(model, plan, call(), part=BOTH)


def test_names_are_those_of_the_whole(model: Seeing, couplings: Couplings) -> None:
    assert [(c.name, c.size, c.members[0].parameter) for c in couplings.offered] == [
        ("language.blocks.0.ffn.2", 12, "language.blocks.0.up.weight"),
        ("language.blocks.1.ffn", 12, "language.blocks.1.up.weight"),
        ("sight.features.ffn", 12, "sight.features.up.weight"),
    ]
    assert couplings.model is model
    assert list(couplings.shapes) == [name for name, _ in model.named_parameters()]
    assert couplings.example is not None
    assert len(couplings.example[0]) == 3


def test_the_whole_equals_masking(model: Seeing, plan: eco.Plan, small: nn.Module) -> None:
    assert {s.name for s in plan if s.kept < s.size} == {"language.blocks.0.ffn.2", "sight.features.ffn"}
    for length in (5, 9):
        assert masked_error(model, small, plan, call(length, seed=length)) < 1e-12
    assert {n: tuple(p.shape) for n, p in small.named_parameters()} == {
        n: tuple(mask[mask.any(1)][:, mask.any(0)].shape) if mask.dim() == 2 else (int(mask.sum()),)
        for n, p in model.named_parameters()
        for mask in [plan.masks(model).get(n, torch.ones_like(p, dtype=torch.bool))]
    }
    assert eco.Plan.from_json(plan.to_json()) == plan


def test_the_smaller_part_passes_for_the_original(model: Seeing, small: nn.Module) -> None:
    language = small.get_submodule("language")
    assert isinstance(small, Seeing)
    assert isinstance(language, Language)
    assert list(small.state_dict()) == list(model.state_dict())
    assert small.language.get_embedding() is small.language.embed is small.reader  # and not the model's
    assert small.language.embed is not model.language.embed
    assert small.head.weight is model.head.weight is small.language.embed.weight
    assert small.language.limit == 64
    assert small.language.dtype == torch.float64
    assert small.language.config is not model.language.config
    assert small.language.config.width == 8
    assert isinstance(small.language.unused["dropout"], nn.Dropout)
    assert small.language.shift is not model.language.shift
    assert small.training
    assert not small.eval().language.training
    assert small.train().language.training
    assert not any(model.language._forward_pre_hooks)
    assert not any(model.language._forward_hooks)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec")
def test_it_is_copied_and_pickled(small: nn.Module) -> None:
    want = small(*call())
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(twin(*call()), want)
        assert isinstance(twin.get_submodule("language"), Language)
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in small.parameters()}


def test_it_trains(small: nn.Module) -> None:
    twin = copy.deepcopy(small)
    twin(*call()).square().mean().backward()
    assert all(p.grad is not None for p in twin.parameters())


def test_a_part_that_is_called_twice(model: Seeing) -> None:
    twice = seeing(calls=2)
    plan = eco.plan(eco.detect(twice, call(), part="language"), 0.5, "random")
    small = eco.shrink(twice, plan, call(), part="language")
    assert masked_error(twice, small, plan, call(7, seed=4)) < 1e-12


def test_paths_are_checked(model: Seeing) -> None:
    with pytest.raises(InputError, match="part='langage' is no module of Seeing: name one by its path, such as 'langu"):
        eco.detect(model, call(), part="langage")
    with pytest.raises(InputError, match=r"part 'language.blocks' is inside of 'language', which is named too"):
        eco.detect(model, call(), part=["language.blocks", "language"])
    with pytest.raises(InputError, match="part 'sight' is inside of 'sight', which is named too"):
        eco.detect(model, call(), part=["sight", "sight"])
    with pytest.raises(InputError, match=r"part=\(\) names no module"):
        eco.detect(model, call(), part=())
    with pytest.raises(InputError, match="part=3 is no module"):
        eco.detect(model, call(), part=3)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(CaptureError, match=r"does not call its part 'language.blocks' \(ModuleList\) on the example"):
        eco.detect(model, call(), part="language.blocks")
    with pytest.raises(CaptureError, match=r"Seeing has to run on the example, so that .* and does not: "):
        eco.detect(model, call()[:2], part="language")
    assert eco.detect(model, call(), part=["language.blocks.0", "language.blocks.1"]).offered  # neither is inside


def test_a_plan_of_another_part_is_refused(model: Seeing, plan: eco.Plan) -> None:
    with pytest.raises(PlanError, match=r"coupling 'sight.features.ffn' of the plan is not of part 'language'"):
        eco.shrink(model, plan, call(), part="language")


def test_a_failure_names_the_parts_that_would_work(model: Seeing) -> None:
    words = "torch.export must trace it, as it does its parts: pass part='language' or part='sight.features'"
    with pytest.raises(CaptureError) as refused:
        eco.detect(model, call())
    assert str(refused.value).endswith(words)
    with pytest.raises(CaptureError, match=r"as it does its part: pass part='sight.features'$"):
        eco.detect(model, call(), part="sight")
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.training


class Reading(Seeing):
    """It also reads a weight inside its part."""

    def forward(self, ids: Tensor, patches: Tensor, sizes: Tensor) -> Tensor:
        first: nn.Module = self.language.blocks[0]
        return super().forward(ids, patches, sizes) + first.get_parameter("up.bias").sum()


class Sharing(Seeing):
    """It has another name for a weight inside its part, which it does not read on this example."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(8, 12)
        self.other.bias = self.language.blocks[0].get_parameter("up.bias")


@pytest.mark.parametrize("kind", [Reading, Sharing])
def test_what_the_rest_reads_stays_whole(kind: type[Seeing], model: Seeing, couplings: Couplings) -> None:
    reading = kind().double()
    found = eco.detect(reading, call(), part="language")
    blocked = {c.name: c.blocked for c in found if c.size == 12}
    assert blocked["language.blocks.1.ffn"] is None
    refusal = blocked["language.blocks.0.ffn.2"]
    assert refusal is not None
    assert refusal.message == (
        "the rest of the model reads parameter 'language.blocks.0.up.bias' outside of part 'language', where it would "
        "not be narrower: name a part that holds every reader, or leave this coupling whole"
    )
    assert refusal.remedy == "name a part that holds every reader, or leave this coupling whole"
    shapes = {n: tuple(p.shape) for n, p in reading.named_parameters()}
    made = eco.Plan.keeping(couplings, {"language.blocks.0.ffn.2": [0, 1], "language.blocks.1.ffn": [2]})
    other = eco.Plan(made.selections, tuple(shapes.items()))
    with pytest.raises(
        PlanError, match=r"coupling 'language.blocks.0.ffn.2' cannot lose a unit: the rest of the model"
    ):
        eco.shrink(reading, other, call(), part="language")
    fits = eco.Plan(made.selections[1:], tuple(shapes.items()))
    assert masked_error(reading, eco.shrink(reading, fits, call(), part="language"), fits, call(seed=3)) < 1e-12


class Hooking(Seeing):
    """It returns what hooks on layers of a class see inside its part."""

    def forward(self, ids: Tensor, patches: Tensor, sizes: Tensor) -> Tensor:
        seen: list[Tensor] = []
        blocks = [module for module in self.language.modules() if isinstance(module, Block)]
        handles = [block.register_forward_hook(lambda _, args, out: seen.append(args[0])) for block in blocks]
        logits = super().forward(ids, patches, sizes)
        for handle in handles:
            handle.remove()
        return torch.cat([logits, *seen[:1]], -1)


class Asking(Seeing):
    """It asks a layer inside its part for what only the original has."""

    def forward(self, ids: Tensor, patches: Tensor, sizes: Tensor) -> Tensor:
        scale: float = getattr(self.language.blocks[0].norm, "eps")  # noqa: B009  # types of layers are modules'
        return super().forward(ids, patches, sizes) * scale


def test_what_is_read_inside_by_others_is_refused(couplings: Couplings) -> None:
    plan = eco.Plan.keeping(couplings, {"language.blocks.0.ffn.2": [0, 1]})
    for kind, error, message in (
        (Hooking, PlanError, r"Hooking with the smaller part does not give on the example what masking gives"),
        (
            Asking,
            CaptureError,
            r"Asking does not run with a graph in place of its part: .* has no attribute 'eps'; name",
        ),
    ):
        with pytest.raises(error, match=message):
            eco.shrink(kind().double(), plan, call(), part="language")


class Uncopied(Seeing):
    def __deepcopy__(self, memo: object) -> Seeing:
        raise RuntimeError("this one is unique")


def test_a_model_that_cannot_be_copied(plan: eco.Plan) -> None:
    with pytest.raises(CaptureError, match=r"Uncopied cannot be copied, so .*: this one is unique"):
        eco.shrink(Uncopied().double(), plan, call(), part=BOTH)


# -- scores and compression --------------------------------------------------------------------------------------

DATA: list[Batch] = [
    ((ids[:1], patches[:3], sizes[:1]), {}) for ids, patches, sizes in (call(seed=i) for i in range(2, 8))
]


def test_scores_are_gradients_of_the_whole(model: Seeing, couplings: Couplings) -> None:
    names = ("language.blocks.1.ffn", "sight.features.ffn")
    scores = eco.score(model, couplings, DATA, loss=loss, method="taylor")
    for name in names:
        expected = torch.zeros(1, 12, dtype=torch.float64)
        for args, kwargs in DATA:
            up, down = (model.get_parameter(f"{name[:-4]}.{part}.weight") for part in ("up", "down"))
            twin = copy.deepcopy(model).eval()
            torch.autograd.backward(loss(twin(*args), args, kwargs))
            bias = twin.get_parameter(f"{name[:-4]}.up.bias")
            grads = [twin.get_parameter(f"{name[:-4]}.{part}.weight").grad for part in ("up", "down")]
            assert bias.grad is not None
            assert grads[0] is not None
            assert grads[1] is not None
            units = (grads[0] * up).sum(1) + (grads[1] * down).sum(0) + bias.grad * bias
            expected[0] += units.detach() / len(DATA)
        assert torch.allclose(scores[name], expected.abs(), rtol=1e-9), name


def test_compress_measures_and_learns_in_the_whole(model: Seeing, couplings: Couplings) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options: dict[str, Any] = {"batches": DATA, "loss": loss, "couplings": couplings.select(modules="language")}
    only_removed = eco.compress(model, call(), ratio=0.5, method="magnitude", part=BOTH, **options)
    small = eco.compress(model, call(), ratio=0.5, part="language", distillation=12, **options)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (small, only_removed)]
    assert sizes[0] == sizes[1] < sum(p.numel() for p in model.parameters())
    assert isinstance(small, Seeing)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert "forward" not in vars(model.language)
    assert model.language.training
    with torch.no_grad():
        errors = [
            sum(float((m(*args) - model(*args)).square().mean()) for args, _ in DATA) for m in (small, only_removed)
        ]
    assert errors[0] < 0.5 * errors[1]


def test_second_order_takes_one_part_that_is_called_once(model: Seeing, couplings: Couplings) -> None:
    options: dict[str, Any] = {"ratio": 0.5, "batches": DATA, "loss": loss, "couplings": couplings}
    with pytest.raises(OptionError, match=r"measures one part at a time, and part= names 2: name one, and call"):
        eco.compress(model, call(), part=BOTH, **options)
    with pytest.raises(PlanError, match=r"coupling 'language\.blocks.* is not of part 'sight.features'"):
        eco.compress(model, call(), part="sight.features", **options)
    options["couplings"] = couplings.select(modules="sight")
    with pytest.raises(ScoreError, match=r"part 'sight.features' is called 2 times in one call of Seeing, and method="):
        eco.compress(model, call(), part="sight.features", **options)


# -- in place ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language(model: Seeing, couplings: Couplings) -> eco.Plan:
    return eco.plan(couplings.select(modules="language"), 0.4, "random")


def test_in_place_the_whole_equals_masking(language: eco.Plan, tmp_path: Path) -> None:
    edited = seeing()
    block, weight = edited.language.blocks[0], edited.language.get_parameter("blocks.0.up.weight")
    with masked(edited, language):
        want = edited(*call(7, seed=3))
    assert eco.shrink_(edited, language, call(), part="language") is edited
    assert torch.allclose(edited(*call(7, seed=3)), want, rtol=1e-12, atol=1e-12)
    kept = next(s.kept for s in language if s.layer == "language.blocks.0")
    assert edited.language.blocks[0] is block
    assert edited.language.get_parameter("blocks.0.up.weight") is weight
    assert edited.language.widths()[0] == kept == len(weight)
    assert edited.training
    assert not hasattr(edited.language, ATTRIBUTE)
    assert origin_of(edited).parts == ("language",)
    with pytest.raises(
        StorageError, match="of this Seeing only language was made smaller, which is not saved as a fol"
    ):
        eco.save(edited, tmp_path / "saved")
    again = eco.plan(eco.detect(edited, call(), part="language"), 0.3, "random")
    eco.shrink_(edited, again, call(), part="language")
    assert not hasattr(edited, ATTRIBUTE)  # it is not what one plan makes of the original


class Measuring(Seeing):
    """What it returns depends on a size inside its part."""

    def forward(self, ids: Tensor, patches: Tensor, sizes: Tensor) -> Tensor:
        width, second = self.language.widths()
        if second < width:
            raise RuntimeError("the second block is narrower than the first")
        return super().forward(ids, patches, sizes) * width


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"language.blocks.0.ffn.2": [0]}, "Measuring with narrower weights does not give what masking gives"),
        (
            {"language.blocks.1.ffn": [0]},
            "does not run with a narrower part 'language', so nothing is written back: the",
        ),
    ],
)
def test_in_place_all_is_as_it_was_where_the_whole_differs(
    couplings: Couplings, kept: dict[str, list[int]], message: str
) -> None:
    measuring = Measuring().double()
    state, plan = {n: t.clone() for n, t in measuring.state_dict().items()}, eco.Plan.keeping(couplings, kept)
    with pytest.raises(PlanError, match=message):
        eco.shrink_(measuring, plan, call(), part="language")
    assert all(torch.equal(tensor, state[name]) for name, tensor in measuring.state_dict().items())
    assert measuring.language.widths() == [12, 12]
    with pytest.raises(
        OptionError, match=r"shrink_\(\) writes one part at a time, and part= names 2: name one, and ca"
    ):
        eco.shrink_(measuring, plan, call(), part=BOTH)  # type: ignore[arg-type]  # on purpose
