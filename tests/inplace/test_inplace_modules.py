"""Attributes of torch's own modules after an edit: as if the module had been built for its new shapes."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import pytorch_utils

import ecospa_fx as eco
from ecospa_fx.inplace.attributes import Place, integers_of
from ecospa_fx.inplace.constructor import constructor_evidence, shapes_of
from ecospa_fx.inplace.edits import Edits
from tests.support.inplace import half, kept, largest, masked_twin, plan_of

# -- every class, by its constructor -----------------------------------------------------------------------------


class Scaled(nn.Linear):
    """A subclass with a constructor of its own, which no attribute tells."""

    def __init__(self, widths: str) -> None:
        inputs, outputs = widths.split("-")
        super().__init__(int(inputs), int(outputs))


class Plain(nn.Linear):
    """A subclass without a constructor."""


Conv1D: Any = pytorch_utils.Conv1D
Pair = tuple[Callable[[], nn.Module], Callable[[], nn.Module]]

BUILT: dict[str, Pair] = {
    "Linear": (lambda: nn.Linear(8, 8), lambda: nn.Linear(8, 4)),
    "Linear columns": (lambda: nn.Linear(8, 8, bias=False), lambda: nn.Linear(4, 8, bias=False)),
    "Linear both": (lambda: nn.Linear(8, 8), lambda: nn.Linear(2, 4)),
    "Linear subclass": (lambda: Plain(8, 8), lambda: Plain(4, 8)),
    "Linear constructor": (lambda: Scaled("8-8"), lambda: Scaled("8-4")),
    "Linear of transformers": (lambda: Conv1D(8, 8), lambda: Conv1D(4, 8)),
    "Bilinear": (lambda: nn.Bilinear(8, 8, 8), lambda: nn.Bilinear(8, 4, 8)),
    "Bilinear rows": (lambda: nn.Bilinear(8, 8, 8), lambda: nn.Bilinear(8, 8, 2)),
    "Conv1d": (lambda: nn.Conv1d(8, 8, 3), lambda: nn.Conv1d(8, 4, 3)),
    "Conv2d": (lambda: nn.Conv2d(8, 8, 2, stride=2), lambda: nn.Conv2d(4, 8, 2, stride=2)),
    "Conv2d depthwise": (
        lambda: nn.Conv2d(8, 8, 3, groups=8, padding="same"),
        lambda: nn.Conv2d(4, 4, 3, groups=4, padding="same"),
    ),
    "Conv2d in groups": (lambda: nn.Conv2d(8, 16, 3, groups=4), lambda: nn.Conv2d(4, 16, 3, groups=4)),
    "Conv2d whole groups": (lambda: nn.Conv2d(8, 16, 3, groups=4), lambda: nn.Conv2d(4, 8, 3, groups=2)),
    "Conv3d": (lambda: nn.Conv3d(8, 8, 1, bias=False), lambda: nn.Conv3d(4, 8, 1, bias=False)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(8, 8, 3), lambda: nn.ConvTranspose1d(8, 4, 3)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(8, 8, 3), lambda: nn.ConvTranspose2d(4, 8, 3)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(8, 4, 3), lambda: nn.ConvTranspose3d(6, 4, 3)),
    "Embedding": (lambda: nn.Embedding(8, 8, padding_idx=4), lambda: nn.Embedding(8, 4, padding_idx=4)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(8, 8, mode="sum"), lambda: nn.EmbeddingBag(8, 4, mode="sum")),
    "LayerNorm": (lambda: nn.LayerNorm(8), lambda: nn.LayerNorm(4)),
    "LayerNorm of two axes": (lambda: nn.LayerNorm((8, 8)), lambda: nn.LayerNorm((8, 4))),
    "RMSNorm": (lambda: nn.RMSNorm(8), lambda: nn.RMSNorm(6)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 8), lambda: nn.GroupNorm(2, 4)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(8), lambda: nn.BatchNorm1d(4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(8, affine=False), lambda: nn.BatchNorm2d(4, affine=False)),
    "BatchNorm3d": (
        lambda: nn.BatchNorm3d(8, track_running_stats=False),
        lambda: nn.BatchNorm3d(6, track_running_stats=False),
    ),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(8), lambda: nn.SyncBatchNorm(4)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(8, affine=True), lambda: nn.InstanceNorm1d(4, affine=True)),
    "InstanceNorm2d": (
        lambda: nn.InstanceNorm2d(8, track_running_stats=True),
        lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    ),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(8, affine=True), lambda: nn.InstanceNorm3d(2, affine=True)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 4), lambda: nn.MultiheadAttention(4, 4)),
    "MultiheadAttention keys": (
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=10, add_bias_kv=True),
        lambda: nn.MultiheadAttention(8, 2, kdim=3, vdim=10, add_bias_kv=True),
    ),
    "MultiheadAttention values": (
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=10, bias=False),
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=5, bias=False),
    ),
    "GRU": (lambda: nn.GRU(8, 8), lambda: nn.GRU(8, 4)),
    "LSTM": (lambda: nn.LSTM(8, 8, 2, bidirectional=True), lambda: nn.LSTM(4, 8, 2, bidirectional=True)),
    "LSTM projected": (lambda: nn.LSTM(8, 8, proj_size=4), lambda: nn.LSTM(8, 8, proj_size=2)),
    "RNN": (lambda: nn.RNN(8, 8, nonlinearity="relu"), lambda: nn.RNN(8, 2, nonlinearity="relu")),
    "RNNBase": (lambda: nn.RNNBase("GRU", 8, 8), lambda: nn.RNNBase("GRU", 8, 4)),
    "GRUCell": (lambda: nn.GRUCell(8, 8), lambda: nn.GRUCell(8, 4)),
    "LSTMCell": (lambda: nn.LSTMCell(8, 8, bias=False), lambda: nn.LSTMCell(4, 8, bias=False)),
    "RNNCell": (lambda: nn.RNNCell(8, 8), lambda: nn.RNNCell(8, 4)),
    "PReLU": (lambda: nn.PReLU(8), lambda: nn.PReLU(4)),
}

ELSEWHERE = {
    "AdaptiveLogSoftmaxWithLoss": "its widths are the modules' inside it, and its cutoffs are those of classes",
    "CrossMapLRN2d": "size is a window",
    "LocalResponseNorm": "size is a window",
    "Fold": "sizes of images",
    "Upsample": "sizes of images",
    "UpsamplingBilinear2d": "sizes of images",
    "UpsamplingNearest2d": "sizes of images",
    "CosineSimilarity": "dim is an axis",
    "DataParallel": "dim is an axis",
    "Flatten": "dims are axes",
    "GLU": "dim is an axis",
    "LogSoftmax": "dim is an axis",
    "Softmax": "dim is an axis",
    "Softmin": "dim is an axis",
    "PairwiseDistance": "keepdim is no width",
    "Unflatten": "no parameter; read by its code, so found by trying",
    "RNNCellBase": "the base of cells, which keeps less than it is built from",
    "Transformer": "keeps no width of its own but d_model, which says the width between layers",
    "TransformerDecoderLayer": "keeps no width of its own",
    "TransformerEncoderLayer": "keeps no width of its own",
}
"""Classes with an argument that is called like a width, and why no attribute of theirs follows a parameter."""

WIDTHS = re.compile(r"features|channels|dim|size|shape|num_parameters|d_model")


def test_every_class_with_widths_is_here() -> None:
    """A class that a later torch adds is noticed: its constructor takes something that is called like a width."""
    told = {name.split(" ")[0] for name in BUILT}
    for name, kind in vars(nn).items():
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)) or re.search("Lazy|Loss$|Pool|Pad", name):
            continue
        arguments = set(inspect.signature(kind).parameters) - {"kernel_size", "start_dim", "end_dim"}
        assert name in told | ELSEWHERE.keys() or not any(map(WIDTHS.search, arguments)), name


def numbers(module: nn.Module) -> dict[Any, int]:
    return {(one.place.name, one.place.index): one.value for one in integers_of(module, "", (), set())}


@pytest.mark.parametrize("name", list(BUILT))
def test_attributes_are_those_of_a_module_built_for_the_shapes(name: str) -> None:
    module, narrow = (build() for build in BUILT[name])
    fixed: Any = {("groups", None): 2} if name == "Conv2d whole groups" else {}  # as trying has shown
    told = constructor_evidence(module, shapes_of(narrow), fixed)
    assert told is not None
    assert told.changes
    edits = Edits()
    for (attribute, index), value in told.changes.items():
        Place("", (), attribute, index).write(module, value, edits)
    assert numbers(module) == numbers(narrow)


def test_what_no_constructor_explains_is_left_alone() -> None:
    odd = nn.Linear(8, 8)
    odd.weight = nn.Parameter(torch.zeros(8, 16))  # whatever that is, it was not built from in_features
    shapes = {**shapes_of(odd), "weight": (4, 16), "bias": (4,)}
    assert constructor_evidence(odd, shapes) is None
    assert constructor_evidence(nn.Linear(8, 8), {"weight": (3, 5), "bias": (7,)}) is None


# -- edited models -----------------------------------------------------------------------------------------------


def edited(model: nn.Module, *args: Tensor, **choice: Any) -> nn.Module:
    """The model after an edit of half of all, or of what is given as `kinds`, equal to masking."""
    model = model.double().eval()
    couplings = eco.detect(model, args, allow=choice.get("allow", ()))
    chosen = tuple(kept(c, c.size // 2) for c in couplings.offered if c.kind in choice.get("kinds", [c.kind]))
    assert chosen
    plan = eco.Plan(chosen, tuple(couplings.shapes.items()))
    twin = None if choice.get("allow") else masked_twin(model, plan)
    want = eco.shrink(copy.deepcopy(model), plan, args)(*args)
    eco.shrink_(model, plan, args)
    with torch.no_grad():
        assert largest(model(*args), want) < 1e-12
        assert twin is None or largest(model(*args), twin(*args)) < 1e-12
    return model


def says(module: Any, **attributes: Any) -> None:
    assert {name: getattr(module, name) for name in attributes} == attributes


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_numbered_linear_layers() -> None:
    model: Any = edited(nn.Sequential(nn.Linear(8, 32), nn.PReLU(32), nn.Linear(32, 8)), tokens(3, 8))
    says(model[0], in_features=8, out_features=16)
    says(model[1], num_parameters=16)
    says(model[2], in_features=16, out_features=8)
    square: Any = edited(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid()), tokens(3, 8))
    says(square[0], in_features=8, out_features=4)
    says(square[2], in_features=4, out_features=8)


class Branches(nn.Module):
    """Layers without numbers: what is bilinear, tied, shared, and a class of one's own with other names."""

    class Own(nn.Module):
        def __init__(self, i: int, o: int, layer: int) -> None:
            super().__init__()
            self.n_in, self.n_out, self.number = i, o, layer
            self.weight = nn.Parameter(torch.randn(o, i) / i)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight)

    def __init__(self) -> None:
        super().__init__()
        self.up, self.again, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.again.weight = self.up.weight
        self.own = nn.ModuleList([self.Own(8, 20, 3), self.Own(20, 8, 20)])
        self.left, self.product, self.last = nn.Linear(8, 10), nn.Bilinear(10, 8, 14), nn.Linear(14, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.up(x).relu() + self.again(x).relu())
        x = x + self.own[1](self.own[0](x).relu())
        out: Tensor = self.last(self.product(self.left(x).relu(), x).relu())
        return out


def test_tied_modules_and_classes_of_ones_own() -> None:
    model: Any = edited(Branches(), tokens(3, 8), kinds=["ffn"])
    for layer in (model.up, model.again):
        says(layer, in_features=8, out_features=6)
    says(model.down, in_features=6, out_features=8)
    says(model.own[0], n_in=8, n_out=10, number=3)
    says(model.own[1], n_in=10, n_out=8, number=20)
    says(model.left, out_features=5)
    says(model.product, in1_features=5, in2_features=8, out_features=7)


def test_images() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.InstanceNorm2d(8)]
    model: Any = edited(nn.Sequential(*layers, nn.ConvTranspose2d(8, 3, 3)), tokens(2, 3, 9, 11))
    says(model[0], in_channels=3, out_channels=4)
    says(model[1], num_features=4)
    says(model[3], in_channels=4, out_channels=4, groups=4)
    says(model[4], num_features=4)
    says(model[5], in_channels=4, out_channels=3)


@pytest.mark.parametrize("affine", [True, False])
def test_norms_over_what_is_kept(affine: bool) -> None:
    norms = nn.LayerNorm(12, elementwise_affine=affine), nn.RMSNorm(12, elementwise_affine=affine)
    model: Any = nn.Sequential(nn.Linear(8, 12), *norms, nn.Linear(12, 8))
    model = edited(model, tokens(3, 8), allow="renormalise")
    says(model[1], normalized_shape=(6,))
    says(model[2], normalized_shape=(6,))
    says(model[3], in_features=6)


def test_what_unflattens() -> None:
    layers = [nn.Linear(8, 32), nn.Unflatten(-1, (4, 8)), nn.ReLU(), nn.Flatten(-2), nn.Linear(32, 8)]
    model: Any = edited(nn.Sequential(*layers), tokens(3, 8), kinds=["ffn"])
    heads, width = model[1].unflattened_size
    assert heads * width == model[0].weight.shape[0] < 32
    says(model[0], out_features=heads * width)
    says(model[4], in_features=heads * width)
    says(model[3], start_dim=-2, end_dim=-1)


class Looking(nn.Module):
    """An embedding, a norm without parameters by groups, and attention to keys of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.keys = nn.Embedding(12, 12, padding_idx=6), nn.Linear(12, 8), nn.Linear(8, 6)
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=8, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.inner(self.table(ids))
        out: Tensor = self.attention(x, self.keys(x).relu(), x)[0]
        return out


def test_embeddings_and_attention() -> None:
    ids = torch.arange(10).view(2, 5)
    model: Any = Looking().double().eval()
    couplings = eco.detect(model, (ids,))
    chosen = [c for c in couplings.offered if c.members[0].parameter in ("table.weight", "keys.weight")]
    assert len(chosen) == 2
    plan = eco.Plan(tuple(kept(c, c.size // 2) for c in chosen), tuple(couplings.shapes.items()))
    twin = masked_twin(model, plan)
    eco.shrink_(model, plan, (ids,))
    assert largest(model(ids), twin(ids)) < 1e-12
    says(model.table, num_embeddings=12, embedding_dim=6, padding_idx=6)
    says(model.keys, in_features=8, out_features=3)
    says(model.attention, embed_dim=8, kdim=3, vdim=8, num_heads=2, head_dim=4)


def test_adapters_fit_numbered_layers() -> None:
    peft: Any = pytest.importorskip("peft")
    model, x = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), torch.randn(2, 8)
    eco.shrink_(model, plan_of(eco.detect(model, (x,)), ["ffn"], half), (x,))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    adapted(x).sum().backward()
