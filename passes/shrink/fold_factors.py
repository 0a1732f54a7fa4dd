"""Factors on parameters go into the parameters, where nothing else reads these."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from ecospa_fx.ir.program import Program


def fold_factors(program: Program, products: Mapping[fx.Node, float]) -> None:
    """Let parameters that are only read in some products, all with one number, hold what these give.

    The function stays as it is; the gradient of such a parameter is that of the original divided by the number.
    """
    nodes: dict[str, list[fx.Node]] = {}
    for node, name in program.parameters.items():
        nodes.setdefault(name, []).append(node)
    for name, places in nodes.items():
        users = [user for node in places for user in node.users]
        factors = {products[user] for user in users} if products and all(user in products for user in users) else ()
        if len(factors) != 1:
            continue
        (factor,) = factors
        with torch.no_grad():
            program.replace_parameter(name, program.tensor(name) * factor)
        for user in users:
            user.replace_all_uses_with(user.all_input_nodes[0])
            program.graph.erase_node(user)
