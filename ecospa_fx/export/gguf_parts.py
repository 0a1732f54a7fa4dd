"""A decoder as readers of llama.cpp compute it, taken out of a module: proven by numbers, not by its class.

RMS norms before attention and before a gated FFN, rotary positions, grouped queries. Which tensor of the module plays
which part is read from the names that the package gguf knows. What the names do not say, such as the width of a head,
is tried. `parts_of` runs the arithmetic on the module's tensors, and refuses unless it gives the module's own numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from ecospa_fx.errors import StorageError
from ecospa_fx.export.layer_fields import numbers_of
from ecospa_fx.relative_error import relative_error

TOLERANCE = 1e-3
"""Of the same arithmetic in float32, in another order, relative as in `ecospa_fx.relative_error`."""

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rotary embeddings that change with the length of the sequence, which a few tokens do not show."""

PLACES = (
    "token_embd", "output_norm", "output", "attn_norm", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output",
    "attn_q_norm", "attn_k_norm", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
)  # fmt: skip
"""What GGUF calls the tensors that the arithmetic reads."""


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Tensors by the names that GGUF has for them, and the numbers that go with them."""

    tensors: Mapping[str, Tensor]
    """In the order of queries and keys that the module has, halves of a head apart; packed ones are taken apart."""
    head_dim: int
    """Numbers per head."""
    epsilon: float
    """Of all norms."""
    frequencies: Tensor
    """Of the rotary embedding, radians per position."""

    @property
    def layers(self) -> int:
        """How many there are."""
        return 1 + max(int(name.split(".")[1]) for name in self.tensors if name.startswith("blk."))

    def rows(self, tensor: str) -> list[int]:
        """The number of rows of a tensor in each layer; 0 where a layer has none."""
        names = (f"blk.{layer}.{tensor}.weight" for layer in range(self.layers))
        return [self.tensors[name].shape[0] if name in self.tensors else 0 for name in names]

    @property
    def heads(self) -> list[int]:
        """Query heads of each layer."""
        return [rows // self.head_dim for rows in self.rows("attn_q")]

    @property
    def kv_heads(self) -> list[int]:
        """Heads of keys and values of each layer."""
        return [rows // self.head_dim for rows in self.rows("attn_k")]

    @property
    def ffn(self) -> list[int]:
        """FFN units of each layer."""
        return self.rows("ffn_up")

    def has(self, tensor: str) -> bool:
        """Whether any layer has a tensor."""
        return any(re.fullmatch(rf"blk\.\d+\.{tensor}", name) for name in self.tensors)


def import_gguf() -> ModuleType:
    """The package that writes GGUF. Raises StorageError where it is not installed."""
    try:
        return import_module("gguf")
    except ImportError as error:
        raise StorageError('gguf is not installed: pip install "ecospa-fx[gguf]"') from error


def parts_of(model: Any, ids: Tensor, want: Tensor) -> Parts:
    """The parts of a module that computes as the readers do.

    ids: LongTensor [batch, length]; want: the module's logits for them. Raises StorageError with what does not fit.
    """
    config = model.config.get_text_config()
    every = _by_role(model, config.num_hidden_layers)
    frequencies = _frequencies(model)
    widths = {getattr(config, "head_dim", None), 2 * frequencies.numel(), *_named(model, "head_dim")}
    best = float("inf")
    sizes = sorted(w for w in widths if isinstance(w, int))
    for tensors, head_dim, epsilon in product(every, sizes, _epsilons(model)):
        try:
            parts = Parts(_apart(tensors, head_dim), head_dim, epsilon, frequencies)
            error = relative_error([computed(parts, ids)], [want.float()])
        except (KeyError, RuntimeError):  # a tensor that is not there, or shapes that do not fit
            continue
        if error <= TOLERANCE:
            return parts
        best = min(best, error)
    close = f"differs from it by {best:.1e}" if best < float("inf") else "does not fit its tensors"
    raise StorageError(
        f"llama.cpp reads no model that computes as this {type(model).__name__} does: the arithmetic of its readers of "
        f"layers of any width (RMS norms, rotary positions, grouped queries, a gated FFN with SiLU) {close}"
    )


def computed(parts: Parts, ids: Tensor, *, half_cache: bool = False) -> Tensor:
    """Logits by the arithmetic of llama.cpp's readers: float32 [batch, length, vocabulary].

    half_cache: with keys and values rounded to half precision, as llama.cpp keeps them.
    """
    t = {name: tensor.float() for name, tensor in parts.tensors.items()}
    angles = torch.arange(ids.shape[1])[:, None] * parts.frequencies.float()
    cos, sin = angles.cos(), angles.sin()
    x = embedding(ids, t["token_embd.weight"])
    for layer in range(parts.layers):
        block = {n.removeprefix(f"blk.{layer}."): tensor for n, tensor in t.items() if n.startswith(f"blk.{layer}.")}
        if "attn_q.weight" in block:
            x = x + _attention(block, _normed(x, block["attn_norm.weight"], parts), parts, (cos, sin), half_cache)
        h = _normed(x, block["ffn_norm.weight"], parts)
        gated = silu(_linear(h, block, "ffn_gate")) * _linear(h, block, "ffn_up")
        x = x + _linear(gated, block, "ffn_down")
    return linear(_normed(x, t["output_norm.weight"], parts), t.get("output.weight", t["token_embd.weight"]))


def _attention(
    block: Mapping[str, Tensor], h: Tensor, parts: Parts, turns: tuple[Tensor, Tensor], half_cache: bool
) -> Tensor:
    q, k, v = (split_heads(_linear(h, block, f"attn_{name}"), -1, parts.head_dim).transpose(1, 2) for name in "qkv")
    if "attn_q_norm.weight" in block:
        q, k = _normed(q, block["attn_q_norm.weight"], parts), _normed(k, block["attn_k_norm.weight"], parts)
    q, k = (_turned(y, *turns) for y in (q, k))
    if half_cache:
        k, v = k.half().float(), v.half().float()
    groups = q.shape[1] // max(k.shape[1], 1)
    k, v = (y.repeat_interleave(groups, 1) for y in (k, v))
    mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
    return _linear(mixed.transpose(1, 2).flatten(2), block, "attn_output")


def split_heads(tensor: Tensor, axis: int, width: int) -> Tensor:
    """A tensor with one of its axes as two: heads, and their numbers."""
    shape = list(tensor.shape)
    axis %= len(shape)
    return tensor.reshape([*shape[:axis], -1 if tensor.numel() else shape[axis] // width, width, *shape[axis + 1 :]])


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first numbers of each head turned, by pairs from its two halves; the rest as it is."""
    width = cos.shape[-1]
    a, b, rest = x[..., :width], x[..., width : 2 * width], x[..., 2 * width :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _linear(x: Tensor, block: Mapping[str, Tensor], name: str) -> Tensor:
    return linear(x, block[f"{name}.weight"], block.get(f"{name}.bias"))


def _normed(x: Tensor, weight: Tensor, parts: Parts) -> Tensor:
    return rms_norm(x, (x.shape[-1],), weight, parts.epsilon)


# -- tensors by role ---------------------------------------------------------------------------------------------


def _by_role(model: nn.Module, layers: int) -> list[dict[str, Tensor]]:
    """Every parameter by its name in GGUF, in each way that some architecture of the package names them all.

    Raises StorageError with a parameter that has no name where none does.
    """
    gguf = import_gguf()
    parameters = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    ways: dict[tuple[str, ...], dict[str, Tensor]] = {}
    nameless: list[list[str]] = []
    for architecture in gguf.MODEL_TENSORS:
        names = _names_of(architecture, layers)
        roles = {name: names.get_name(name, (".weight", ".bias")) for name in parameters}
        roles = {name: role for name, role in roles.items() if role is not None and role.split(".")[-2] in PLACES}
        tensors = {role: parameters[name] for name, role in roles.items()}
        if len(tensors) == len(parameters):
            ways.setdefault(tuple(tensors), tensors)
        nameless.append([name for name in parameters if name not in roles] or list(roles))
    if not ways:
        raise StorageError(
            f"llama.cpp reads no model like this {type(model).__name__}: its readers of layers of any width have "
            f"no place for {min(nameless, key=len)[0]}"
        )
    return list(ways.values())


def _names_of(architecture: Any, layers: int) -> Any:
    """The names that an architecture of the package gguf has for tensors.

    What one of them has for itself the package writes over what all share, from where it is taken out again.
    """
    gguf = import_gguf()
    shared = vars(gguf.TensorNameMap).get("block_mappings_cfg", {})
    before = dict(shared)
    try:
        return gguf.get_tensor_name_map(architecture, layers)
    finally:
        shared.clear()
        shared.update(before)


def _apart(tensors: Mapping[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """Packed queries, keys and values, and packed gates, as tensors of their own."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, part, kind = name.rpartition(".")[0].rpartition(".")[0], name.split(".")[-2], name.rpartition(".")[2]
        if part == "attn_qkv":
            rows = tensors[f"{stem}.attn_output.weight"].shape[1]
            keys = (tensor.shape[0] - rows) // 2
            for letter, piece in zip("qkv", torch.split_with_sizes(tensor, [rows, keys, keys]), strict=True):
                result[f"{stem}.attn_{letter}.{kind}"] = piece
        elif part == "ffn_up" and f"{stem}.ffn_gate.{kind}" not in tensors:
            gate, up = tensor.chunk(2)
            result.update({f"{stem}.ffn_gate.{kind}": gate, f"{stem}.ffn_up.{kind}": up})
        else:
            result[name] = tensor
    return result


def _frequencies(model: Any) -> Tensor:
    """Of the rotary embedding: the only buffer of its length. Raises StorageError where there are several, or none."""
    for path, module in model.named_modules():
        if getattr(module, "rope_type", None) in LENGTH_DEPENDENT:
            raise StorageError(f"{path} turns by other angles in long sequences, which readers of llama.cpp do not")
    tensors: list[Tensor] = list(model.buffers())
    buffers = [b.detach().cpu() for b in tensors if b.dim() == 1 and b.is_floating_point() and b.numel()]
    if not buffers or not all(torch.equal(b, buffers[0]) for b in buffers):
        raise StorageError(
            f"llama.cpp reads no model like this {type(model).__name__}: it has not one table of rotary frequencies"
        )
    return buffers[0]


def _named(model: nn.Module, name: str) -> Iterator[float]:
    return (value for (_, attribute), value in numbers_of(model).items() if attribute == name)


def _epsilons(model: nn.Module) -> list[float]:
    """The small fractions among the attributes of the model's parts: one of them is the norms'."""
    values = {value for value in numbers_of(model).values() if isinstance(value, float) and 0 < value < 1e-2}
    return sorted(values, reverse=True)
