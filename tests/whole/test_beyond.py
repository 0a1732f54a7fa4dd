"""Shapes of models beyond the usual ones: what is found, that it is exact, and that refusals say why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ecospa_fx as eco
from ecospa_fx.errors import CaptureError, InputError
from ecospa_fx.verify import masked_error
from tests.support.exported_once import exported_once
from tests.support.rotary import rotated

HIDDEN, HEADS, GROUPS, WIDTH, UNITS = 12, 4, 2, 6, 8


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def offers(model: nn.Module, args: tuple[Any, ...]) -> str:
    """Detects, proves two random plans, and returns what was offered."""
    couplings = eco.detect(model, args)
    with exported_once():
        for seed in range(2):
            plan = eco.plan(couplings, ratio=0.5, scores="random", seed=seed)
            assert masked_error(model, eco.shrink(model, plan, args), plan, args) <= 1e-9
    return ", ".join(sorted(f"{c.kind} {c.size}×{c.carriers}" for c in couplings.offered))


# -- caches ------------------------------------------------------------------------------------------------------


class Cached(nn.Module):
    """Grouped-query attention over a cache that is a buffer."""

    def __init__(self, write: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, n * WIDTH) for n in (HEADS, GROUPS, GROUPS))
        self.o, self.write = nn.Linear(HEADS * WIDTH, HIDDEN), write
        self.register_buffer("keys", torch.zeros(2, GROUPS, 5, WIDTH))
        self.register_buffer("values", torch.zeros(2, GROUPS, 5, WIDTH))
        self.keys: Tensor
        self.values: Tensor

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for f in (self.q, self.k, self.v))
        self.write(self.keys, at, k)
        self.write(self.values, at, v)
        k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (self.keys, self.values))
        out: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


def write_rows(cache: Tensor, at: Tensor, new: Tensor) -> None:
    cache[:, :, at] = new


def write_slice(cache: Tensor, at: Tensor, new: Tensor) -> None:
    cache[:, :, 3:4] = new


def write_shifted(cache: Tensor, at: Tensor, new: Tensor) -> None:
    cache.copy_(torch.cat([cache[:, :, 1:], new], 2))


def write_copied(cache: Tensor, at: Tensor, new: Tensor) -> None:
    cache.index_copy_(2, at, new)


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_rows, write_slice, write_shifted, write_copied])
def test_a_cache_in_buffers_shrinks_with_the_pair(write: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
    torch.manual_seed(0)
    model, args = Cached(write).double(), (noise(2, 1, HIDDEN), torch.tensor([3]))
    with torch.no_grad():
        model.keys.normal_()
        model.values.normal_()
    assert offers(model, args) == "heads 2×1, heads 2×2, qk 6×2, vo 6×2"
    plan = eco.plan(eco.detect(model, args), ratio=0.5, scores="random", kinds=["qk", "vo"])
    small = eco.shrink(model, plan, args)
    assert tuple(small.get_buffer("keys").shape) == (2, GROUPS, 5, plan["qk"].kept)
    assert tuple(model.keys.shape) == (2, GROUPS, 5, WIDTH)


@pytest.mark.slow
def test_a_cache_that_is_an_input_keeps_its_width() -> None:
    class Given(Cached):
        def forward(self, x: Tensor, at: Tensor, keys: Tensor, values: Tensor) -> Any:  # type: ignore[override]
            q, k, v = (f(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for f in (self.q, self.k, self.v))
            keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
            k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (keys, values))
            return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), keys, values

    model = Given(write_rows).double()
    args = (noise(2, 1, HIDDEN), torch.tensor([3]), noise(2, GROUPS, 5, WIDTH), noise(2, GROUPS, 5, WIDTH))
    assert "qk" not in offers(model, args)
    messages = {c.blocked.message for c in eco.detect(model, args).blocked if c.blocked}
    assert any("part of the model's output" in message for message in messages)


# -- modules that are called several times -------------------------------------------------------------------------


class Universal(nn.Module):
    """One layer, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(HIDDEN, 2, UNITS, batch_first=True, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layer(x)
        return x


@pytest.mark.slow
def test_a_layer_called_three_times_has_one_set_of_parameters() -> None:
    model, args = Universal().double(), (noise(2, 3, HIDDEN),)
    assert offers(model, args) == "ffn 8×1, heads 2×1, qk 6×2, vo 6×2"
    small = eco.shrink(model, eco.plan(eco.detect(model, args), ratio=0.5, scores="magnitude"), args)
    assert set(small.state_dict()) == set(model.state_dict())
    assert not any(p.is_meta for p in small.parameters())


# -- how a model is called -----------------------------------------------------------------------------------------


class Pair(nn.Module):
    """linear → operation → linear."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.middle = nn.Linear(HIDDEN, UNITS), nn.Linear(UNITS, HIDDEN), middle

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        out: Tensor = self.down(self.middle(self.up(x)))
        return out


def test_arguments_caught_by_name_leave_the_batch_free() -> None:
    model, args, kwargs = Pair(torch.relu).double(), (noise(2, 3, HIDDEN),), {"unused": False}
    plan = eco.plan(eco.detect(model, args, kwargs), ratio=0.5, scores="magnitude")
    small = eco.shrink(model, plan, args, kwargs)
    assert masked_error(model, small, plan, (noise(5, 4, HIDDEN),), kwargs) <= 1e-9


def test_a_size_that_the_code_fixes_is_refused_by_the_small_model() -> None:
    model, args = Pair(lambda h: torch.stack([row.relu() for row in h.unbind(0)])).double(), (noise(2, 3, HIDDEN),)
    small = eco.shrink(model, eco.plan(eco.detect(model, args), ratio=0.5, scores="magnitude"), args)
    with pytest.raises(InputError, match=r"of shape \[2, any, 12\], not \[4, 3, 12\]"):
        small(noise(4, 3, HIDDEN))


def test_repeats_of_a_symbolic_batch_stay_symbolic() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(HIDDEN, UNITS), nn.Linear(UNITS, HIDDEN)
            self.table = nn.Parameter(torch.randn(3, HIDDEN))

        def forward(self, x: Tensor) -> Tensor:
            rows = self.up(self.table).view(3, 2, 4).transpose(0, 1).repeat(x.shape[0], 1, 1)
            own = self.up(x).view(x.shape[0], 3, 2, 4).transpose(1, 2).reshape(-1, 3, 4)
            out: Tensor = self.down((rows * own).view(-1, 2, 3, 4).transpose(1, 2).flatten(2))
            return out

    model, args = Repeated().double(), (noise(2, 3, HIDDEN),)
    couplings = eco.detect(model, args)
    assert len(couplings.offered) == 2
    plan = eco.plan(couplings, ratio=0.5, scores="random")
    assert masked_error(model, eco.shrink(model, plan, args), plan, (noise(5, 3, HIDDEN),)) <= 1e-9


# -- refusals ------------------------------------------------------------------------------------------------------


def refusal(model: nn.Module) -> str:
    """Why nothing between the two layers can go."""
    couplings = eco.detect(model, (noise(2, 3, HIDDEN),))
    assert not couplings.offered
    return " ".join(c.blocked.message for c in couplings.blocked if c.blocked)


def test_loops_and_branches_say_that_they_are_not_followed() -> None:
    def branch(h: Tensor) -> Tensor:
        out: Tensor = torch.cond(h.sum() > 0, lambda y: y.relu(), lambda y: y.tanh(), (h,))
        return out

    assert "the graph that it calls is not followed" in refusal(Pair(branch).double())


def test_weight_norm_says_what_to_do() -> None:
    model = Pair(torch.relu).double()
    for layer in (model.up, model.down):
        nn.utils.parametrizations.weight_norm(layer)
    assert "remove_parametrizations" in refusal(model)


@pytest.mark.filterwarnings("ignore")
def test_quantised_modules_are_refused_by_name() -> None:
    from torch.ao.nn.quantized.dynamic import Linear

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Linear(HIDDEN, HIDDEN)  # type: ignore[no-untyped-call]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x)
            return out

    with pytest.raises(
        CaptureError, match=r"module .layer. .* holds quantised weights: compress the float model first"
    ):
        eco.detect(Quantised(), (torch.randn(2, HIDDEN),))


# -- views ---------------------------------------------------------------------------------------------------------


def test_fused_projections_selected_behind_two_views_have_widths_of_their_own() -> None:
    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o = nn.Linear(HIDDEN, 3 * 2 * WIDTH), nn.Linear(2 * WIDTH, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            b, h, w, _ = x.shape
            qkv = self.qkv(x).reshape(b, h * w, 3, 2, -1).permute(2, 0, 3, 1, 4).reshape(3, b * 2, h * w, -1)
            q, k, v = qkv.unbind(0)
            mixed = (q @ k.mT).softmax(-1) @ v
            out: Tensor = self.o(mixed.view(b, 2, h * w, -1).transpose(1, 2).flatten(2))
            return out

    assert offers(Windowed().double(), (noise(2, 2, 3, HIDDEN),)) == "heads 2×1, qk 6×2, vo 6×2"


def test_a_shape_taken_from_another_tensor_ties_nothing() -> None:
    class Shaped(Pair):
        def __init__(self) -> None:
            super().__init__(torch.relu)
            self.other, self.back = nn.Linear(HIDDEN, UNITS), nn.Linear(UNITS, HIDDEN)

        def forward(self, x: Tensor, **options: Any) -> Tensor:
            other = self.other(x)
            own = self.up(x).unflatten(-1, (2, 4)).relu().reshape_as(other)
            out: Tensor = self.down(own) + self.back(other.tanh())
            return out

    assert offers(Shaped().double(), (noise(2, 3, HIDDEN),)) == "ffn 2×1, ffn 4×2, ffn 8×1"


# -- convolutions that do not reach along a dim --------------------------------------------------------------------


class SpatialGate(nn.Module):
    """gMLP: half of the hidden units gates the other half, after a mixture of the places."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix, self.down = nn.Linear(HIDDEN, 2 * UNITS), nn.Conv1d(5, 5, 1), nn.Linear(UNITS, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = F.gelu(self.up(x)).chunk(2, -1)
        out: Tensor = self.down(value * self.mix(gate))
        return out


class Skip(nn.Module):
    """Attention with a convolution of the values over time, one window per head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(HIDDEN, 3 * HEADS * WIDTH), nn.Linear(HEADS * WIDTH, HIDDEN)
        self.mix = nn.Conv2d(HEADS, HEADS, (3, 1), padding=(1, 0), groups=HEADS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v) + self.mix(v)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


def test_windows_of_one_place_mix_nothing_along_their_axis() -> None:
    torch.manual_seed(0)
    assert offers(SpatialGate().double(), (noise(2, 5, HIDDEN),)) == "ffn 8×1"
    assert offers(Skip().double(), (noise(2, 5, HIDDEN),)) == "heads 4×1, qk 6×4, vo 6×4"


# -- parameters that many couplings read ---------------------------------------------------------------------------


class Turned(nn.Module):
    """Attention whose rotation is looked up in a learnt table."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(HIDDEN, 3 * HEADS * WIDTH), nn.Linear(HEADS * WIDTH, HIDDEN)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        cos, sin = table.cos(), table.sin()
        q, k = (rotated(t, cos, sin) for t in (q, k))
        out: Tensor = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Tabled(nn.Module):
    """Two layers that read one table of angles, and two that share one gain of their hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.angles, self.layers = nn.Embedding(9, WIDTH // 2), nn.ModuleList(Turned() for _ in range(2))
        self.gain = nn.Parameter(torch.rand(UNITS))
        self.up, self.down = (
            nn.ModuleList(nn.Linear(*sizes) for _ in range(2)) for sizes in ((HIDDEN, UNITS), (UNITS, HIDDEN))
        )

    def forward(self, x: Tensor) -> Tensor:
        table = self.angles(torch.arange(x.shape[1])).repeat(1, 2)
        for layer, up, down in zip(self.layers, self.up, self.down, strict=True):
            x = layer(x, table)
            x = x + down(up(x).relu() * self.gain)
        return x


@pytest.mark.slow
def test_a_parameter_that_only_multiplies_what_many_weights_made_ties_nothing_together() -> None:
    torch.manual_seed(0)
    model, args = Tabled().double(), (noise(2, 5, HIDDEN),)
    assert offers(model, args) == ", ".join(["ffn 8×1"] * 2 + ["heads 4×1"] * 2 + ["qk 3×4"] * 2 + ["vo 6×4"] * 2)
    held = {m.parameter for c in eco.detect(model, args).offered for m in c.members}
    assert not held & {"angles.weight", "gain"}


def test_a_gain_of_one_layer_goes_with_its_units() -> None:
    class Gained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(HIDDEN, UNITS), nn.Linear(UNITS, HIDDEN)
            self.gain = nn.Parameter(torch.rand(UNITS))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = self.down(self.up(x).tanh() * self.gain)
            return x

    model, args = Gained().double(), (noise(2, 5, HIDDEN),)
    assert offers(model, args) == "ffn 8×1"
    assert "gain" in {m.parameter for c in eco.detect(model, args).offered for m in c.members}
