"""Decoding with a static cache: one new token per sequence, the cache nearly full."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from shapes import half, layers_of
from timing import memory, seconds
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.verify import narrowed

ROOM = 64
"""Positions of the cache that are free, and tokens that are decoded per measurement."""

Call = dict[str, Any]


def cache_for(module: nn.Module, config: Any, size: tuple[int, int], device: str) -> Any:
    """A static cache of (sequences, positions), as wide as a module fills it, with numbers in all but the last ones."""
    from transformers import StaticCache

    cache: Any = StaticCache(config=config, max_cache_len=size[1])
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # a prompt that is read once
        module(
            input_ids=torch.zeros(size[0], 4, dtype=torch.long, device=device), past_key_values=cache, use_cache=True
        )
    return cache


def tensors_of(cache: Any) -> list[Tensor]:
    """The keys and values of all layers."""
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


class Decoder:
    """One module with its cache, and what was measured of it."""

    def __init__(self, name: str, module: nn.Module, call: Call) -> None:
        self.name, self.module, self.call = name, module.eval(), call
        self.seconds: list[float] = []
        self.memory, self.graphed = float("nan"), False
        self.run: Callable[[], None] = self.step
        self.cache = call["past_key_values"]
        for tensor in tensors_of(self.cache):
            tensor.normal_()

    @property
    def bytes(self) -> int:
        """Of the keys and values."""
        return sum(t.numel() * t.element_size() for t in tensors_of(self.cache))

    @torch.no_grad()
    def step(self) -> None:
        """One token."""
        self.module(**self.call)

    def rewind(self) -> None:
        """The cache with its last positions free."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(layer.max_cache_len - ROOM)

    def prepare(self) -> None:
        """Compile every layer, and record a step as one CUDA graph where there are any: launches would dominate."""
        for layer in layers_of(self.module):
            layer.compile(dynamic=False)
        self.rewind()
        for _ in range(3):
            self.step()
        self.memory = memory(self.step)
        if next(self.module.parameters()).device.type == "cuda":
            self._record()

    def _record(self) -> None:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.step()
        except RuntimeError as error:
            print(f"{self.name} cannot be recorded as a CUDA graph: {error}", flush=True)
        else:
            self.run, self.graphed = graph.replay, True

    def measure(self, tokens: int) -> None:
        """Seconds per step, once more."""
        self.rewind()
        self.seconds.append(seconds(self.run, tokens))


def call_of(module: nn.Module, config: Any, size: tuple[int, int], device: str) -> Call:
    """The arguments that decode one token per sequence."""
    ids = torch.zeros(size[0], 1, dtype=torch.long, device=device)
    return {"input_ids": ids, "past_key_values": cache_for(module, config, size, device), "use_cache": True}


def builders(dense: nn.Module, by_hand: Callable[[], nn.Module], shape: dict[str, Any], device: str) -> dict[str, Any]:
    """Functions that make the decoders of a model, by name; each has a cache of its own."""
    config: Any = dense.config
    size = shape["decode"]

    def plain(name: str, module: nn.Module) -> Decoder:
        return Decoder(name, module, call_of(module, module.config, size, device))

    def graph() -> Decoder:
        call = call_of(dense, config, size, device)
        plan = half(eco.detect(dense, (), call, allow="cache"), shape)
        small = eco.shrink(dense, plan, (), call)
        return Decoder("shrunk graph", small, narrowed(small, (), call)[1])

    def module() -> Decoder:
        ids = torch.randint(0, shape["vocabulary"], (2, 8), device=device)
        own, example = copy.deepcopy(dense), {"input_ids": ids, "use_cache": False}
        for layer in layers_of(own):
            layer._compiled_call_impl = None
        eco.shrink_(own, half(eco.detect(own, (), example), shape, ("heads", "ffn")), (), example)
        return plain("shrunk module", own)

    return {
        "dense module": lambda: plain("dense module", dense),
        "shrunk graph": graph,
        "by hand": lambda: plain("by hand", by_hand()),
        "shrunk module": module,
    }
