"""Puts what resize rules ask for into a graph: calls of other operators in place of one."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ecospa_fx.axes.resize import Term
from ecospa_fx.errors import PlanError
from ecospa_fx.ir.build import inherit
from ecospa_fx.ir.program import Program
from ecospa_fx.ir.provenance import module_of
from ecospa_fx.ir.schema import Args, Kwargs

_MUL = torch.ops.aten.mul.Tensor


class TermNodes:
    """Puts terms of a rule into a graph before a node, each once."""

    def __init__(self, program: Program, before: fx.Node) -> None:
        self.program, self.before = program, before
        self.nodes: dict[Term, fx.Node] = {}

    @property
    def products(self) -> dict[fx.Node, float]:
        """The nodes that multiply something by a number, and the number."""
        factors = {node: term.arguments[1] for term, node in self.nodes.items() if term.target is _MUL}
        return {node: factor for node, factor in factors.items() if isinstance(factor, float)}

    def give(self, node: fx.Node, term: Term) -> None:
        """Let a node compute a term."""
        args, kwargs = self.arguments(term)
        node.target, node.args, node.kwargs = term.target, args, kwargs

    def arguments(self, term: Term) -> tuple[Args, Kwargs]:
        """The arguments of a term as a graph holds them."""
        args = tuple(self.argument(argument) for argument in term.arguments)
        return args, {name: self.argument(value) for name, value in term.options.items()}

    def argument(self, argument: object) -> Any:
        """An argument as a graph holds it: terms are nodes, tensors are buffers."""
        if isinstance(argument, Term):
            return self._node(argument)
        if isinstance(argument, Tensor):
            with self.program.graph.inserting_before(self.before):
                return self.program.add_buffer(module_of(self.before), argument.contiguous())
        return argument

    def _node(self, term: Term) -> fx.Node:
        if term not in self.nodes:
            args, kwargs = self.arguments(term)
            with self.program.graph.inserting_before(self.before):
                node = self.program.graph.call_function(term.target, args, kwargs)
            self.nodes[term] = inherit(node, self.before)
        return self.nodes[term]


def replace_results(program: Program, node: fx.Node, results: Sequence[Term]) -> TermNodes:
    """Let each result of a node be computed by itself, where it is read."""
    terms = TermNodes(program, node)
    if not isinstance(node.meta["val"], list | tuple):
        terms.give(node, results[0])
        return terms
    for user in list(node.users):
        index = user.args[1] if user.target is operator.getitem else None
        if not isinstance(index, int):
            raise PlanError(f"node {user.name} reads all results of {node.name} at once, of which some are computed")
        terms.give(user, results[index])
    program.graph.erase_node(node)
    return terms
