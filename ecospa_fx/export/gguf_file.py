"""Writes a smaller model as a GGUF file, for llama.cpp and what is built on it.

Where all layers are alike, under a plain architecture; where they differ, under one of the two whose readers take a
width per layer. Which one is chosen by what the module computes, see `parts_of`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecospa_fx.errors import StorageError
from ecospa_fx.export.gguf_parts import Parts, import_gguf, split_heads

EMPTY_FFN = 32
"""Units, all zero, of an FFN that lost all its own: llama.cpp leaves out the whole layer where there are none."""

BLOCK = 32
"""Numbers of a row that Q8_0 stores together; rows of other lengths stay in half precision, as llama.cpp does it."""

TYPES = {torch.float32: "F32", torch.float64: "F32", torch.float16: "F16", torch.bfloat16: "BF16", "q8_0": "Q8_0"}
"""How weights are stored, by type or name."""


@dataclass(frozen=True, slots=True)
class GgufReader:
    """What one of llama.cpp's architectures reads."""

    name: str
    """As GGUF files call it."""
    ragged: bool = False
    """Whether layers may have widths of their own."""
    normed: bool = False
    """Whether queries and keys are normed, each head for itself."""
    biased: bool = False
    """Whether projections may have biases."""
    tied: bool = False
    """Whether the output has to be the embedding."""
    interleaved: bool = False
    """Whether pairs that are turned stand beside each other; otherwise half a head apart."""
    packed: bool = False
    """Whether queries, keys and values are one tensor."""
    scaled: bool = False
    """Whether rotary frequencies may be any."""

    def misfit(self, parts: Parts) -> str | None:
        """Why a model does not fit; None where it does."""
        widths = {"heads": parts.heads, "KV heads": parts.kv_heads, "FFN units": parts.ffn}
        for what, values in widths.items():
            if not self.ragged and len(set(values)) > 1:
                return f"its layers differ in {what}"
        if self.normed != parts.has("attn_q_norm.weight"):
            return "queries and keys are " + ("not normed" if self.normed else "normed")
        if not self.biased and parts.has(r"\w+\.bias"):
            return "it has biases"
        if self.tied and "output.weight" in parts.tensors:
            return "its output is not tied to its embedding"
        if not self.scaled and not torch.allclose(frequency_factors(parts), torch.ones(()), atol=1e-5):
            return "its rotary frequencies are scaled"
        if 0 in parts.heads and self.name != "deci":
            return "a layer has no attention"
        return None


READERS = (
    GgufReader("llama", biased=True, interleaved=True, scaled=True),
    GgufReader("qwen3", normed=True),
    GgufReader("deci", ragged=True, biased=True, interleaved=True, scaled=True),
    GgufReader("openelm", ragged=True, normed=True, tied=True, packed=True),
)
"""Those of llama.cpp that compute what `parts_of` proves, the plainest first."""


def reader_for(parts: Parts) -> GgufReader:
    """The first reader that a model fits. Raises StorageError with the reason of each where there is none."""
    misfits = {reader.name: reader.misfit(parts) for reader in READERS}
    fitting = [reader for reader in READERS if misfits[reader.name] is None]
    if not fitting:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in misfits.items())
        raise StorageError(f"no reader of llama.cpp fits this model ({reasons}): plan with uniform=True")
    return fitting[0]


def frequency_base(parts: Parts) -> float:
    """θ of the frequencies θ^(−2i/d), from the second of them; llama.cpp computes them from it."""
    return float(parts.frequencies.double()[1] ** -len(parts.frequencies)) if len(parts.frequencies) > 1 else 1e4


def frequency_factors(parts: Parts, base: float | None = None) -> Tensor:
    """What llama.cpp's frequencies have to be divided by to become the model's."""
    count = len(parts.frequencies)
    base = frequency_base(parts) if base is None else base
    return (base ** (-torch.arange(count).double() / count) / parts.frequencies.double()).float()


def write_gguf(path: Path, writer: Any, parts: Parts, reader: GgufReader, *, kind: str, context: int) -> None:
    """Write the tensors and settings of a model with a writer that has its tokenizer already.

    kind: how weights are stored, one of the values of `TYPES`. context: tokens of the longest sequence.
    """
    gguf = import_gguf()
    tensors = _stored(parts, reader)
    ffn = [width or EMPTY_FFN for width in parts.ffn]
    writer.add_block_count(parts.layers)
    writer.add_context_length(context)
    writer.add_embedding_length(parts.tensors["token_embd.weight"].shape[1])
    writer.add_vocab_size(parts.tensors["token_embd.weight"].shape[0])
    writer.add_feed_forward_length(ffn if reader.ragged else ffn[0])
    writer.add_head_count(parts.heads if reader.ragged else parts.heads[0])
    writer.add_head_count_kv(parts.kv_heads if reader.ragged else parts.kv_heads[0])
    writer.add_key_length(parts.head_dim)
    writer.add_value_length(parts.head_dim)
    writer.add_layer_norm_rms_eps(parts.epsilon)
    writer.add_rope_freq_base(frequency_base(parts))
    writer.add_rope_dimension_count(2 * len(parts.frequencies))
    writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(kind, f"MOSTLY_{kind}")])
    for name, tensor in tensors.items():
        quantised = _type_of(tensor, kind)
        array = tensor.float().contiguous().numpy()
        raw = gguf.GGMLQuantizationType[quantised]
        writer.add_tensor(name, array if quantised == "F32" else gguf.quants.quantize(array, raw), raw_dtype=raw)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()


def as_stored(parts: Parts, kind: str) -> Parts:
    """The parts with the weights that a file has, rounded as they are stored."""
    quants = import_gguf().quants
    tensors: dict[str, Tensor] = {}
    for name, tensor in parts.tensors.items():
        raw = import_gguf().GGMLQuantizationType[_type_of(tensor, kind)]
        stored = quants.quantize(tensor.float().contiguous().numpy(), raw) if tensor.numel() else None
        tensors[name] = tensor if stored is None else torch.from_numpy(quants.dequantize(stored, raw))
    return replace(parts, tensors=tensors)


def _type_of(tensor: Tensor, kind: str) -> str:
    if tensor.dim() == 1:
        return "F32"
    return "F16" if kind == "Q8_0" and tensor.shape[-1] % BLOCK else kind


def _stored(parts: Parts, reader: GgufReader) -> dict[str, Tensor]:
    """The tensors as a reader wants them."""
    result: dict[str, Tensor] = {}
    for name, tensor in _filled(parts):
        stem, part, kind = name.rpartition(".")[0].rpartition(".")[0], name.split(".")[-2], name.rpartition(".")[2]
        if reader.interleaved and part in ("attn_q", "attn_k"):
            result[name] = interleaved(tensor, parts)
        elif reader.packed and part == "attn_q":
            pieces = [parts.tensors[f"{stem}.attn_{letter}.{kind}"] for letter in "qkv"]
            result[f"{stem}.attn_qkv.{kind}"] = torch.cat(pieces)
        elif not (reader.packed and part in ("attn_k", "attn_v")):
            result[name] = tensor
    factors = frequency_factors(parts)
    if not torch.allclose(factors, torch.ones(()), atol=1e-5):
        result["rope_freqs.weight"] = factors
    return result


def _filled(parts: Parts) -> Iterator[tuple[str, Tensor]]:
    """All tensors; of an FFN without units a few that are zero, of attention without heads none."""
    headless = tuple(f"blk.{layer}.attn_" for layer, heads in enumerate(parts.heads) if not heads)
    for name, tensor in parts.tensors.items():
        if name.startswith(headless):
            continue
        if tensor.numel() or ".ffn_" not in name:
            yield name, tensor
        else:
            yield name, tensor.new_zeros([size or EMPTY_FFN for size in tensor.shape])


def interleaved(tensor: Tensor, parts: Parts) -> Tensor:
    """Rows of queries or keys in the order of readers that turn neighbours: of each head 0, d/2, 1, d/2 + 1, …"""
    turned = 2 * len(parts.frequencies)
    heads = split_heads(tensor, 0, parts.head_dim)
    first, rest = heads[:, :turned], heads[:, turned:]
    pairs = split_heads(first, 1, turned // 2).transpose(1, 2).flatten(1, 2)
    return torch.cat([pairs, rest], 1).flatten(0, 1)
