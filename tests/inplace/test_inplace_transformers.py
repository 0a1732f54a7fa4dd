"""Plans written back into models of transformers, and plans that a module or its configuration can carry."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import ecospa_fx as eco
from ecospa_fx.errors import PlanError
from ecospa_fx.plan import Plan, Selection
from ecospa_fx.verify import masked
from tests.support.hugging import couplings_of, tiny
from tests.support.inplace import assert_loaded, assert_same, half, largest, masked_twin, plan_of, state, uneven
from tests.support.rotary import rotated

# -- transformers ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_models_of_transformers(name: str) -> None:
    model, kwargs = tiny(name)
    config: Any = model.config
    before = config.to_dict()
    plan = plan_of(couplings_of(name), ["ffn", "heads"], uneven)
    twin = masked_twin(model, plan)
    with pytest.warns(UserWarning, match="cannot say how wide the layers"):
        eco.shrink_(model, plan, (), kwargs)
    assert config.to_dict() == before  # widths that differ by layer are none of its
    with torch.no_grad():
        assert largest(model(**kwargs).logits, twin(**kwargs).logits) < 1e-12
        if name in ("llama", "gpt2"):
            prompt = kwargs["input_ids"][:, :4]
            options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            got: Any = model
            want: Any = twin
            tokens = got.generate(prompt, **options)
            assert torch.equal(tokens, want.generate(prompt, **options))
            assert torch.equal(tokens, got.generate(prompt, **options, cache_implementation="static"))
            cache = got(**{**kwargs, "use_cache": True}).past_key_values
            assert (
                cache.layers[0].keys.shape[1]
                < want(**{**kwargs, "use_cache": True}).past_key_values.layers[0].keys.shape[1]
            )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_head_dimensions_that_an_attribute_carries(name: str) -> None:
    model, kwargs = tiny(name)
    plan = plan_of(couplings_of(name), ["qk", "vo"], half)
    with masked(model, plan), torch.no_grad():
        want = model(**kwargs).logits
    with pytest.warns(UserWarning, match="cannot say how wide the layers"):
        eco.shrink_(model, plan, (), kwargs)
    with torch.no_grad():
        assert largest(model(**kwargs).logits, want) < 1e-12


@pytest.mark.slow
def test_head_dimensions_of_other_widths_than_their_keys_are_refused() -> None:
    model, kwargs = tiny("gpt2")
    before = state(model)
    plan = plan_of(couplings_of("gpt2"), ["vo"], half)
    with pytest.raises(PlanError, match=r"'transformer\.h\.0\.attn\.vo'"):
        eco.shrink_(model, plan, (), kwargs)
    assert_same(model, before)


class Turned(nn.Module):
    """Attention whose queries and keys are turned by angles from tables that all layers share, two entries per pair."""

    cos: Tensor
    sin: Tensor
    bias: Tensor

    def __init__(self, interleaved: bool, layers: int = 2) -> None:
        super().__init__()
        self.interleaved, self.width = interleaved, 8
        angles = torch.arange(16)[:, None] / 7 ** (torch.arange(4) / 4)
        angles = angles.repeat_interleave(2, 1) if interleaved else torch.cat([angles, angles], 1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.register_buffer("bias", torch.randn(16, 16))
        self.qkv = nn.ModuleList(nn.Linear(16, 96) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(32, 16) for _ in range(layers))

    def turned(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        if self.interleaved:
            swapped = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        else:
            return rotated(x, cos, sin)
        return x * cos + swapped * sin

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias[: x.shape[1], : x.shape[1]]
        for i, qkv in enumerate(self.qkv):
            q, k, v = (y.unflatten(-1, (-1, self.width)).transpose(1, 2) for y in qkv(x).chunk(3, -1))
            mixed = scaled_dot_product_attention(self.turned(q), self.turned(k), v, attn_mask=bias, scale=0.3)
            x = x + self.out[i](mixed.transpose(1, 2).flatten(2))
        return x


@pytest.mark.slow
@pytest.mark.parametrize("interleaved", [False, True])
def test_tables_that_all_layers_share_are_cut_where_all_keep_the_same_pairs(interleaved: bool, tmp_path: Path) -> None:
    model, args = Turned(interleaved).double(), (torch.randn(2, 6, 16, dtype=torch.float64),)
    plan = eco.plan(
        eco.detect(model, args), 0.4, expressible_in="module", kinds=["qk", "vo"], floor=0, scores="magnitude"
    )
    pairs = {units for s in plan if s.kind == "qk" for units in s.keep}
    assert len(pairs) == 1
    kept = 2 * len(pairs.pop())
    twin = masked_twin(model, plan)
    eco.shrink_(model, plan, args)
    x = torch.randn(3, 9, 16, dtype=torch.float64)
    assert largest(model(x), twin(x)) < 1e-12
    assert (model.width, model.cos.shape[1], model.sin.shape[1]) == (kept, kept, kept)
    eco.save(model, tmp_path / "own")
    back = eco.load(tmp_path / "own", model=lambda: Turned(interleaved))
    assert type(back) is Turned
    assert torch.equal(back(x), model(x))


@pytest.mark.slow
def test_rotary_head_dimensions_of_a_llama(tmp_path: Path) -> None:
    model, kwargs = tiny("llama")
    couplings = couplings_of("llama")
    plan = eco.plan(couplings, 0.4, expressible_in="module", kinds=["qk", "vo", "ffn"], floor=0, scores="magnitude")
    twin: Any = masked_twin(model, plan)
    with pytest.warns(UserWarning, match="cannot say how wide the layers"):
        own: Any = eco.shrink_(model, plan, (), kwargs)
    kept = next(s.kept for s in plan if s.kind == "qk")
    assert kept < 8
    assert {name: b.numel() for name, b in own.model.rotary_emb.named_buffers()} == dict.fromkeys(
        ("inv_freq", "original_inv_freq"), kept
    )
    prompt = kwargs["input_ids"][:, :4]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        assert largest(own(**kwargs).logits, twin(**kwargs).logits) < 1e-12
        tokens = own.generate(prompt, **options)
        assert torch.equal(tokens, twin.generate(prompt, **options))
        assert torch.equal(tokens, own.generate(prompt, **options, cache_implementation="static"))
        assert own(input_ids=prompt, use_cache=True).past_key_values.layers[0].keys.shape[-1] == 2 * kept
    eco.save(own, tmp_path / "own")
    back: Any = eco.load(tmp_path / "own")
    with torch.no_grad():
        assert_loaded(back, own, kwargs)


@pytest.mark.slow
def test_other_pairs_in_each_layer_cannot_share_a_table() -> None:
    model, kwargs = tiny("llama")
    before = state(model)
    with pytest.raises(PlanError, match="cannot be written back into the module"):
        eco.shrink_(model, plan_of(couplings_of("llama"), ["qk", "vo"], half), (), kwargs)
    assert_same(model, before)


# -- plans that a module, or its configuration, can carry --------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kinds"), [("llama", {"ffn", "heads"}), ("gpt2", {"ffn", "qk", "vo"})])
def test_plans_stay_within_what_the_code_carries(name: str, kinds: set[str]) -> None:
    model, kwargs = tiny(name)
    plan = eco.plan(couplings_of(name), ratio=0.4, expressible_in="module", floor=0, scores="magnitude")
    assert {s.kind for s in plan} == kinds
    assert 0.35 < plan.removed_parameters / plan.coupled_parameters < 0.45
    assert len({s.kept for s in plan if s.kind == "ffn"}) == 2
    for qk, vo in zip(*([s for s in plan if s.kind == kind] for kind in ("qk", "vo")), strict=True):
        assert qk.kept == vo.kept
    twin = masked_twin(model, plan)
    with pytest.warns(UserWarning, match="cannot say how wide the layers"):
        eco.shrink_(model, plan, (), kwargs)
    with torch.no_grad():
        assert largest(model(**kwargs).logits, twin(**kwargs).logits) < 1e-12


def test_what_no_code_carries_is_said() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.down(self.up(x).relu().view(-1, 12))
            return out

    model, args = Fixed(), (torch.randn(3, 8),)
    with pytest.raises(
        PlanError, match=r"the code of Fixed can carry none of its couplings .*leave expressible_in out"
    ):
        eco.plan(eco.detect(model, args), expressible_in="module", scores="magnitude")
    couplings = eco.detect(model, args)
    couplings.example = None
    with pytest.raises(PlanError, match="do not know their example inputs"):
        eco.plan(couplings, expressible_in="module", scores="magnitude")
    options: Any = {"expressible_in": "file", "scores": "magnitude"}
    with pytest.raises(PlanError, match="expressible_in='file' is unknown: give 'module'"):
        eco.plan(couplings, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_standard_checkpoints(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model, kwargs = tiny(name)
    dense = copy.deepcopy(model)
    own: Any = model
    plan = eco.plan(couplings_of(name), ratio=0.4, expressible_in="module", uniform=True, floor=0, scores="magnitude")
    eco.shrink_(model, plan, (), kwargs)
    assert not [one for one in recwarn if "cannot say" in str(one.message)]  # a configuration that follows
    own.save_pretrained(tmp_path)
    assert "ecospa" not in "".join(path.read_text(errors="ignore") for path in tmp_path.glob("*.json"))
    loaded: Any = type(own).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in dense.parameters())
    with torch.no_grad():
        assert_loaded(loaded, own, kwargs)
        got = loaded(**kwargs).logits
        assert largest(got, masked_twin(dense, plan)(**kwargs).logits) < 1e-12
        if name in ("llama", "gpt2"):
            options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            want: Any = masked_twin(dense, plan)
            prompt = kwargs["input_ids"][:, :4]
            assert torch.equal(loaded.generate(prompt, **options), want.generate(prompt, **options))


@pytest.mark.slow
def test_numbers_of_heads_are_those_that_the_configuration_takes() -> None:
    options = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 4}
    model, kwargs = tiny("llama", **options, num_hidden_layers=1)
    couplings = eco.detect(model, (), kwargs)
    for ratio in (0.2, 0.5):
        plan = eco.plan(
            couplings,
            ratio,
            expressible_in="module",
            uniform=True,
            kinds=["heads", "qk", "vo"],
            floor=0,
            scores="magnitude",
        )
        assert {s.kept for s in plan} <= {1, 2, 3, 4, 6}  # divisors of the hidden size
    eco.shrink_(model, plan, (), kwargs)
    config: Any = model.config
    assert config.num_attention_heads == config.num_key_value_heads == plan.selections[0].kept == 3


def test_a_configuration_of_ones_own_follows() -> None:
    @dataclass
    class Sizes:
        hidden: int = 8
        inner: int = 20

    class Configured(nn.Module):
        def __init__(self, sizes: Sizes) -> None:
            super().__init__()
            self.sizes = sizes
            self.up, self.down = nn.Linear(sizes.hidden, sizes.inner), nn.Linear(sizes.inner, sizes.hidden)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.down(self.up(x).relu())
            return out

    model, args = Configured(Sizes()), (torch.randn(3, 8),)
    eco.shrink_(
        model, eco.plan(eco.detect(model, args), expressible_in="module", uniform=True, scores="magnitude"), args
    )
    assert (model.sizes.hidden, model.sizes.inner) == (8, 10)


# -- configurations that cannot follow ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "field"), [("ffn", "intermediate_size = 32"), ("heads", "num_attention_heads = 4")])
def test_a_configuration_that_cannot_follow_is_named(kind: str, field: str) -> None:
    model, kwargs = tiny("llama")
    if kind == "ffn":
        field = "intermediate_size = 112"
    plan = plan_of(couplings_of("llama"), [kind], lambda c, i: c.size // 2 if i else c.size)
    with pytest.warns(
        UserWarning, match=rf"^config\.{field}\b.* cannot say .*LlamaForCausalLM .*ecospa_fx\.save"
    ) as told:
        eco.shrink_(model, plan, (), kwargs)
    assert [one.filename for one in told if "cannot say" in str(one.message)] == [__file__]
    assert "vocab_size" not in str(told[0].message)


@pytest.mark.slow
@pytest.mark.parametrize("counts", [{"heads": (2, 2), "heads.2": (2, 3)}, {"heads": (1, 2), "heads.2": (1, 3)}])
def test_heads_and_groups_of_heads_go_together(counts: dict[str, tuple[int, int]]) -> None:
    """Also where the code that counts heads per group is not run, as in attention that repeats keys and values."""
    model, kwargs = tiny("llama", num_attention_heads=6)
    couplings = eco.detect(model, (), kwargs)
    carried = eco.plan(couplings, 0.4, "random", expressible_in="module", kinds=["heads"])
    assert {s.name for s in carried} == {c.name for c in couplings.offered if c.contains}
    selections = []
    for c in (c for c in couplings.offered if c.contains):
        keep = torch.zeros(c.carriers, c.size, dtype=torch.bool)
        keep[:, : counts[c.name.partition("self_attn.")[2]][int(c.layer.split(".")[2])]] = True
        selections.append(Selection.of(c, keep))
    plan = Plan(tuple(selections), tuple(couplings.shapes.items()))
    twin, attention = masked_twin(model, plan), "model.layers.{}.self_attn"
    with pytest.warns(UserWarning, match="cannot say how wide the layers"):
        eco.shrink_(model, plan, (), kwargs)
    per_group: list[Any] = [model.get_submodule(attention.format(i)).num_key_value_groups for i in range(2)]
    assert per_group == list(counts["heads.2"])
    for implementation in ("sdpa", "eager"):
        for each in (model, twin):
            each.set_attn_implementation(implementation)  # type: ignore[operator]
        with torch.no_grad():
            assert largest(model(**kwargs).logits, twin(**kwargs).logits) < 1e-12
