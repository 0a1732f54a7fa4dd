"""New example values for nodes whose widths change, worked out with numbers in place of symbols.

torch takes ten to a hundred times as long for an operator on symbolic sizes, and all that changes are numbers: which
axes are symbols, and which, stays as it was. Where that is not so, the operator is evaluated as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from ecospa_fx.ir.build import evaluate
from ecospa_fx.ir.pytrees import Tree
from ecospa_fx.ir.schema import Size, Sizes


class NotNumbers(Exception):
    """Numbers alone do not tell what a node's example value is."""


class ExampleValues:
    """Evaluates the nodes of one graph, in its order, while their inputs change.

    sizes: the number that stands for a size.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._values: dict[fx.Node, Tree] = {}

    def renew(self, node: fx.Node) -> None:
        """Give a node the example value that follows from its inputs. Raises what its operator raises."""
        self._values.pop(node, None)
        try:
            value = self._computed(node)
            node.meta["val"] = self._with_symbols(node.meta.get("val"), value)
        except NotNumbers:
            node.meta["val"] = evaluate(node)
        else:
            self._values[node] = value

    def _computed(self, node: fx.Node) -> Tree:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self._of)
        kwargs = dict(kwargs)
        function: Any = node.target
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta")  # what is as large as a number chosen for a symbol takes no memory
        try:
            with torch.no_grad():
                return _without_memory(function(*args, **kwargs))
        except Exception as error:  # whatever it is, evaluating with symbols raises it again, or does not
            raise NotNumbers from error

    def _of(self, node: fx.Node) -> Tree:
        if node not in self._values:
            if "val" not in node.meta:
                raise NotNumbers
            self._values[node] = self._in_numbers(node.meta["val"])
        return self._values[node]

    def _in_numbers(self, value: object) -> Tree:
        if isinstance(value, list | tuple):
            return type(value)(self._in_numbers(item) for item in value)
        if isinstance(value, Tensor):
            if detect_fake_mode([value]) is None or value.layout is not torch.strided:
                raise NotNumbers
            shape, strides = ([self.sizes(s) for s in sizes] for sizes in (value.shape, value.stride()))
            return torch.empty_strided(shape, strides, dtype=value.dtype, device="meta")
        if isinstance(value, torch.SymInt):
            return self.sizes(value)
        if value is None or isinstance(value, bool | int | float):
            return value
        raise NotNumbers

    def _with_symbols(self, before: object, after: object) -> Tree:
        """A value in numbers with the symbols that the value before the change had in the same places."""
        if isinstance(after, list | tuple):
            if not isinstance(before, list | tuple) or len(before) != len(after):
                raise NotNumbers
            return type(before)(self._with_symbols(a, b) for a, b in zip(before, after, strict=True))
        if after is None and before is None:
            return None
        if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.dim() != after.dim():
            raise NotNumbers
        mode = detect_fake_mode([before])
        if mode is None or before.dtype != after.dtype:
            raise NotNumbers
        shape = [self._size(*sizes) for sizes in zip(before.shape, after.shape, strict=True)]
        strides = self._strides(before, after, shape)
        with mode:
            return torch.empty_strided(shape, strides, dtype=before.dtype, device=before.device)

    def _size(self, before: Size, after: int) -> Size:
        if self.sizes(before) == after:
            return before
        if not is_concrete_int(before):
            raise NotNumbers
        return after

    def _strides(self, before: Tensor, after: Tensor, shape: Sequence[Size]) -> list[Size]:
        """Strides from the innermost axis outwards: each is that of the axis inside it times that one's size.

        An axis without positions counts as one with a single position, as in torch.
        """
        numbers = [[self.sizes(s) for s in sizes] for sizes in (before.shape, before.stride())]
        if numbers == [list(after.shape), list(after.stride())]:
            return list(before.stride())
        strides: list[Size] = [0] * len(shape)
        inside: Size = 1
        for axis in sorted(range(len(shape)), key=lambda i: (after.stride(i), after.shape[i], -i)):
            stride, number = after.stride(axis), self.sizes(inside)
            if stride == 0:
                continue
            if stride != number:  # a part of something wider
                if stride % number or not is_concrete_int(before.stride(axis)):
                    raise NotNumbers
                inside = inside * (stride // number)
            strides[axis] = inside
            inside = inside * shape[axis] if after.shape[axis] else inside
        return strides


def _without_memory(value: object) -> Tree:
    """A value on the meta device: operators that make tensors of nothing put them elsewhere."""
    if isinstance(value, list | tuple):
        return type(value)(_without_memory(item) for item in value)
    return value.to("meta") if isinstance(value, Tensor) and not value.is_meta else value
