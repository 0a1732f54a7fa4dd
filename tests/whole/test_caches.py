"""Caches that go in and come out: objects that hold tensors, and loops that decode token by token."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ecospa_fx as eco
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.report import couplings_json, explain
from ecospa_fx.errors import InputError, PlanError
from ecospa_fx.verify import masked, masked_error, narrowed

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings(
    "ignore:`past_key_values` is deprecated:FutureWarning",  # which is how caches are called in older versions
    "ignore:what was traced of:UserWarning",  # a static cache is written into, so that a second call differs
)

HIDDEN, HEADS, GROUPS, WIDTH, VOCABULARY = 24, 4, 2, 6, 50
KINDS = ["llama", "gpt2"]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def language_model(kind: str, layers: int = 1) -> Any:
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if kind == "llama":
        made = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=40, num_hidden_layers=layers,
                num_attention_heads=HEADS, num_key_value_heads=GROUPS, max_position_embeddings=64, **special,
            )
        )  # fmt: skip
    else:
        made = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=layers, n_head=HEADS, n_positions=64, **special
            )
        )
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.double().eval()


@functools.cache
def without_cache(kind: str) -> Couplings:
    """What is found where no cache goes in or comes out."""
    return eco.detect(language_model(kind), (tokens(3),), {"use_cache": False})


def empty_cache(model: Any, width: int = WIDTH) -> Any:
    """A cache of no positions, with tensors in it."""
    heads: int = getattr(model.config, "num_key_value_heads", HEADS)
    layer = (torch.zeros(2, heads, 0, width, dtype=torch.float64),) * 2
    return transformers.DynamicCache([layer] * model.config.num_hidden_layers)


def fresh_cache(model: Any) -> Any:
    return transformers.DynamicCache(config=model.config)


def filled_cache(model: Any) -> Any:
    return model(tokens(5), use_cache=True).past_key_values


def static_cache(model: Any) -> Any:
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(tokens(5), past_key_values=cache, use_cache=True)
    return cache


def halved(model: nn.Module, args: Any, kwargs: Mapping[str, Any], **options: Any) -> tuple[nn.Module, eco.Plan]:
    plan = eco.plan(eco.detect(model, args, kwargs, **options), ratio=0.5, scores="random")
    assert plan.removed_parameters
    return eco.shrink(model, plan, args, kwargs), plan


# -- the call stays the same ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "which"),
    [("llama", "none"), ("llama", "fresh"), ("llama", "filled"), ("llama", "static"), ("gpt2", "filled")],
)
def test_caches_go_in_and_come_out_as_they_did(kind: str, which: str) -> None:
    model = language_model(kind)
    fresh = fresh_cache(model)
    cases: dict[str, tuple[Tensor, Mapping[str, Any]]] = {
        "none": (tokens(5), {}),
        "fresh": (tokens(5), {"past_key_values": fresh}),
        "filled": (tokens(3), {"past_key_values": filled_cache(model)}),
        "static": (tokens(1), {"past_key_values": static_cache(model)}),
    }
    example, given = cases[which]
    args, kwargs = (example,), {**given, "use_cache": True}
    small, plan = halved(model, args, kwargs)
    assert masked_error(model, small, plan, args, kwargs) <= 1e-9
    assert type(small(*args, **kwargs).past_key_values) is type(given.get("past_key_values", fresh))
    # the last call filled it; tracing did not
    assert fresh.get_seq_length() == (5 if which == "fresh" else 0)


@pytest.mark.slow
def test_one_graph_reads_the_prompt_and_decodes() -> None:
    model = language_model("llama", layers=2)
    small, plan = halved(model, (tokens(3),), {"past_key_values": filled_cache(model), "use_cache": True})
    mine, its = empty_cache(model), empty_cache(model)
    for step, length in enumerate([5, 1, 1, 1]):
        ids = tokens(length, seed=step)
        got = small(ids, past_key_values=mine, use_cache=True)
        with masked(model, plan), torch.no_grad():
            want = model(ids, past_key_values=its, use_cache=True)
        torch.testing.assert_close(got.logits, want.logits, atol=1e-11, rtol=1e-9)
        assert got.past_key_values is mine
    torch.testing.assert_close(mine.layers[1].keys, its.layers[1].keys, atol=1e-11, rtol=1e-9)


# -- objects of any kind ---------------------------------------------------------------------------------------------


class Memory:
    """A cache of the caller's own."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.held, self.turn, self.itself = {"keys": keys, "values": [values]}, 0, self


class Remembering(nn.Module):
    """Grouped-query attention over what a memory holds, which it grows."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, n * WIDTH) for n in (HEADS, GROUPS, GROUPS))
        self.o = nn.Linear(HEADS * WIDTH, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 8), nn.Linear(8, HIDDEN)

    def forward(self, x: Tensor, memory: Memory, counts: bool = False) -> Any:
        q, k, v = (f(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for f in (self.q, self.k, self.v))
        held: Any = memory.held
        held["keys"] = torch.cat([held["keys"], k], 2)
        held["values"][0] = torch.cat([held["values"][0], v], 2)
        memory.turn += counts
        k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (held["keys"], held["values"][0]))
        out = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return {"out": out + self.down(self.up(out).relu()), "memory": memory}


def memory() -> Memory:
    return Memory(noise(2, GROUPS, 4, WIDTH), noise(2, GROUPS, 4, WIDTH, seed=1))


@pytest.mark.slow
def test_an_object_of_the_callers_own_is_grown_in_place() -> None:
    model, example = Remembering().double(), memory()
    small, plan = halved(model, (noise(2, 3, HIDDEN), example), {})
    assert tuple(example.held["keys"].shape) == (2, GROUPS, 4, WIDTH)  # type: ignore[attr-defined]
    own, its = memory(), memory()
    for step in range(3):
        x = noise(2, 1, HIDDEN, seed=step)
        got = small(x, own)
        with masked(model, plan):
            want = model(x, its)
        torch.testing.assert_close(got["out"], want["out"], atol=1e-11, rtol=1e-9)
        assert got["memory"] is own is own.itself
    torch.testing.assert_close(own.held, its.held, atol=1e-11, rtol=1e-9)


def test_an_object_in_another_state_is_refused_with_what_differs() -> None:
    model = Remembering().double()
    small, _ = halved(model, (noise(2, 3, HIDDEN), memory()), {"counts": True})
    own = memory()
    small(noise(2, 1, HIDDEN), own, counts=True)
    assert own.turn == 1
    with pytest.raises(InputError, match=r"a Memory differs from the example's: .turn is 1 instead of 0; shrink"):
        small(noise(2, 1, HIDDEN), own, counts=True)


# -- caches that shrink --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_returned_keys_block_and_say_which_option_lifts_it() -> None:
    couplings = eco.detect(language_model("llama"), (tokens(5),), {"use_cache": True})
    messages = {
        m.parameter.split(".")[-2]: c.blocked.message for c in couplings.blocked if c.blocked for m in c.members
    }
    wanted = "it is part of the model's output; allow='cache' (--allow cache) would offer it with a narrower output"
    assert messages["k_proj"] == messages["v_proj"] == wanted
    plan = eco.plan(without_cache("llama"), ratio=0.5, scores="magnitude")
    with pytest.raises(PlanError, match="would offer it with a narrower output"):
        eco.shrink(language_model("llama"), plan, (tokens(5),), {"use_cache": True})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "which"),
    [("llama", "none"), ("llama", "fresh"), ("llama", "filled"), ("llama", "static"), ("gpt2", "filled")],
)
def test_allowed_the_caches_shrink_with_the_pair(kind: str, which: str) -> None:
    model = language_model(kind)
    makers: dict[str, Callable[[Any], Any]] = {"fresh": fresh_cache, "filled": filled_cache, "static": static_cache}
    given = {"past_key_values": makers[which](model)} if which in makers else {}
    args, kwargs = (tokens(1 if which == "static" else 3),), {**given, "use_cache": True}
    couplings = eco.detect(model, args, kwargs, allow="cache")
    assert [(c.name, c.size, c.carriers) for c in couplings.offered] == [
        (c.name, c.size, c.carriers) for c in without_cache(kind).offered
    ]
    plan = eco.plan(couplings, ratio=0.5, scores="random")
    assert plan.allow == ("cache",)
    assert eco.Plan.from_json(plan.to_json()) == plan
    small = eco.shrink(model, plan, args, kwargs)
    assert masked_error(model, small, plan, args, kwargs) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_model_decodes_with_its_own_caches(kind: str) -> None:
    model = language_model(kind)
    example = (tokens(3),), {"past_key_values": filled_cache(model), "use_cache": True}
    plan = eco.plan(eco.detect(model, *example, allow="cache"), ratio=0.5, scores="random", uniform=True)
    prompt = eco.shrink(model, plan, (tokens(5),), {"use_cache": True})
    small = eco.shrink(model, plan, *example)
    mine, own, its = prompt(tokens(5), use_cache=True).past_key_values, empty_cache(model), empty_cache(model)
    for step, length in enumerate([5, 1, 1, 1]):
        ids = tokens(length, seed=step)
        with masked(model, plan), torch.no_grad():
            want = model(ids, past_key_values=its, use_cache=True).logits
        for cache in (own, mine) if step else (own,):
            got = small(ids, past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-9)
    width = next(s.kept for s in plan if s.kind == "qk") * (2 if kind == "llama" else 1)  # of rotary pairs
    assert mine.layers[0].keys.shape[-1] == own.layers[0].keys.shape[-1] == width < WIDTH
    assert torch.equal(mine.layers[0].keys, own.layers[0].keys)


@pytest.mark.slow
@pytest.mark.parametrize("which", [filled_cache, static_cache])
def test_a_dense_cache_is_cut_on_its_way_in(which: Callable[[Any], Any]) -> None:
    model = language_model("gpt2")
    small, plan = halved(model, (tokens(1),), {"past_key_values": which(model), "use_cache": True}, allow="cache")
    with masked(model, plan), torch.no_grad():
        mine, its = which(model), which(model)  # of the prompt that both have read
        for step in range(3):
            ids = tokens(1, seed=step)
            got = small(ids, past_key_values=mine, use_cache=True).logits
            want = model(ids, past_key_values=its, use_cache=True).logits
            torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-9)
    assert mine.layers[0].keys.numel() < its.layers[0].keys.numel()
    assert mine.get_seq_length() == its.get_seq_length() == 8


@pytest.mark.slow
def test_a_dense_tensor_that_is_written_into_is_refused_with_what_cuts_it() -> None:
    model = Stateful(GROWING["in place"]).double()
    args = (noise(2, 1, HIDDEN), noise(1, WIDTH), noise(2, GROUPS, 4, WIDTH), noise(2, GROUPS, 4, WIDTH, seed=1))
    small, _ = halved(model, args, {}, allow="cache")
    with pytest.raises(InputError, match=r"takes an input keys of shape .* cut yours with .*narrowed"):
        small(*args)
    (x, turn, keys, values), _ = narrowed(small, args)
    before = keys.clone()
    assert small(x, turn, keys, values)[1] is keys
    assert not torch.equal(keys, before)
    appended = Stateful(GROWING["appended"]).double()
    small, plan = halved(appended, args, {}, allow="cache")
    with masked(appended, plan):
        torch.testing.assert_close(small(*args)[0], appended(*args)[0], atol=1e-11, rtol=1e-9)


class Stateful(nn.Module):
    """Attention whose cache, and whose rotation, the caller gives as tensors."""

    def __init__(self, grow: Any) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, n * WIDTH) for n in (HEADS, GROUPS, GROUPS))
        self.o, self.grow = nn.Linear(HEADS * WIDTH, HIDDEN), grow

    def forward(self, x: Tensor, turn: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Any:
        q, k, v = (f(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = q * turn, k * turn
        grow = self.grow if mask is None else lambda old, new: torch.where(mask, new, old)
        keys, values = grow(keys, k), grow(values, v)
        k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (keys, values))
        out = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out, keys, values, turn


GROWING = {
    "appended": lambda old, new: torch.cat([old, new], 2),
    "shifted": lambda old, new: torch.cat([old[:, :, 1:], new], 2),
    "put": lambda old, new: torch.ops.aten.index_put.default(old, [None, None, torch.tensor([1])], new),
    "copied": lambda old, new: old.index_copy(2, torch.tensor([1]), new),
    "scattered": lambda old, new: old.slice_scatter(new, 2, 1, 2),
    "chosen": lambda old, new: torch.where(torch.arange(4)[:, None] == 1, new, old),
    "in place": lambda old, new: old.index_copy_(2, torch.tensor([1]), new),
}


@pytest.mark.slow
@pytest.mark.parametrize("grow", GROWING)
def test_tensors_that_hold_a_cache_shrink_and_others_do_not(grow: str) -> None:
    torch.manual_seed(0)
    model = Stateful(GROWING[grow]).double()
    args = (noise(2, 1, HIDDEN), noise(1, WIDTH), noise(2, GROUPS, 4, WIDTH), noise(2, GROUPS, 4, WIDTH, seed=1))
    couplings = eco.detect(model, args, allow="cache")
    assert sorted(f"{c.kind} {c.size}×{c.carriers}" for c in couplings.offered) == [
        "heads 2×1", "heads 2×2", "qk 6×2", "vo 6×2",
    ]  # fmt: skip
    plan = eco.plan(couplings, ratio=0.5, scores="random")
    small = eco.shrink(model, plan, args)
    assert masked_error(model, small, plan, args) <= 1e-9
    (_, turn, keys, values), _ = narrowed(small, args)
    groups = next(s.kept for s in plan if s.kind == "heads" and s.carriers == 1)
    assert tuple(turn.shape) == (1, WIDTH)
    assert tuple(keys.shape) == (2, groups, 4, plan["qk"].kept)
    assert tuple(values.shape) == (2, groups, 4, plan["vo"].kept)


def test_a_mask_that_chooses_from_a_cache_is_none() -> None:
    """None of its elements goes into the cache: the caller's mask stays as wide as it is."""
    torch.manual_seed(0)
    model = Stateful(None).double()
    mask = torch.rand(2, GROUPS, 4, WIDTH, generator=torch.Generator().manual_seed(3)) > 0.5
    stored = (noise(2, GROUPS, 4, WIDTH), noise(2, GROUPS, 4, WIDTH, seed=1))
    args = (noise(2, 1, HIDDEN), noise(1, WIDTH), *stored, mask)
    small, plan = halved(model, args, {}, allow="cache")
    assert masked_error(model, small, plan, args) <= 1e-9
    (_, _, keys, values, given), _ = narrowed(small, args)
    assert keys.numel() < stored[0].numel() > values.numel()
    assert torch.equal(given, mask)


def test_a_returned_hidden_layer_stays_as_wide_as_it_was() -> None:
    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(HIDDEN, 8), nn.Linear(8, HIDDEN)

        def forward(self, x: Tensor) -> Any:
            hidden = self.up(x).relu()
            return self.down(hidden), hidden

    (blocked,) = [c for c in eco.detect(Shown(), (torch.randn(2, HIDDEN),), allow="cache").blocked if c.size == 8]
    assert blocked.blocked is not None
    assert blocked.blocked.message.startswith("it is part of the model's output; do not return it")


def test_narrower_caches_are_noted_everywhere() -> None:
    couplings = eco.detect(language_model("llama"), (tokens(5),), {"use_cache": True}, allow="cache")
    (first, *_) = [c for c in couplings.offered if c.kind == "qk"]
    assert first.resized is not None
    assert "offered, an output gets narrower (output)" in str(couplings)
    assert "resized: an output gets narrower" in explain(first)
    assert '"resized": {' in couplings_json(couplings)
    assert "(narrower cache)" in str(eco.plan(couplings, ratio=0.5, scores="magnitude"))
