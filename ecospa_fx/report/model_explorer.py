"""Node data for Model Explorer, which colours the nodes of an exported program by it.

The format is that of Model Explorer's custom node data: results by node, with a gradient. Load the ``.pt2`` of
``torch.export`` and then this file. Nodes go by their names in the graph that couplings were detected in; nodes that
were rewritten there have no counterpart and stay as they are.
"""

from __future__ import annotations

from ecospa_fx.axes.findings import Value
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.plan import Plan
from ecospa_fx.report.content import Json, kept_share

REFUSED = "#f2b8b5"
"""Colour of nodes at which something is refused."""

GRADIENT = [{"stop": 0, "bgColor": "#f3e9d7"}, {"stop": 1, "bgColor": "#7fa7ee"}]


def node_data(couplings: Couplings, plan: Plan | None) -> Json:
    """By node the share of units that stays: the least of all couplings that pass it."""
    keep, results = {s.name: s.keep for s in plan or ()}, dict[str, Json]()
    parameters = _parameters(couplings)
    shares: dict[str, float] = {}
    for c in couplings:
        share = kept_share(c, keep)
        if share is None or c.blocked is not None:
            continue
        nodes = [step.node for step in c.path]
        nodes += [parameters[m.parameter] for m in c.members if m.parameter in parameters]
        shares.update({node: min(share, shares.get(node, 1.0)) for node in nodes})
    for node, share in shares.items():
        results[node] = {"value": round(share, 4)}
    for refusal in (c.blocked for c in couplings):
        if refusal is not None:
            results[refusal.node] = {"value": shares.get(refusal.node, 1.0), "bgColor": REFUSED}
    return {"name": "share of units kept", "results": results, "gradient": GRADIENT}


def _parameters(couplings: Couplings) -> dict[str, str]:
    """The nodes that stand for parameters, by name of parameter; none where no graph is known."""
    if couplings.analysis is None:
        return {}
    values = couplings.analysis.flow.values
    places = {
        n: v.weights[0] for n, v in values.items() if n.op == "placeholder" and isinstance(v, Value) and v.weights
    }
    return {parameter: node.name for node, parameter in places.items()}
