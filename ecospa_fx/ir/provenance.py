"""Where a node comes from: its operator, the user's own line, the module."""

from __future__ import annotations

from torch import fx

from ecospa_fx.ir.schema import operator_name


def operator_of(node: fx.Node) -> str:
    """The operator's qualified name, or what stands in its place."""
    if node.op != "call_function":
        return node.op
    return (
        operator_name(node.target)
        if hasattr(node.target, "_schema")
        else str(getattr(node.target, "__name__", node.target))
    )


def source_of(node: fx.Node) -> str:
    """The user's own line: "file:line: code", from the graph's metadata."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.strip().splitlines()]
    for index in range(len(lines) - 1, -1, -1):
        if lines[index].startswith("File ") and not lines[index].startswith('File "<'):  # code that a tracer made up
            place = lines[index].split(", in ")[0].removeprefix("File ").replace('"', "").replace(", line ", ":")
            code = lines[index + 1] if index + 1 < len(lines) else ""
            return f"{place}: {code}".rstrip(": ")
    return ""


def module_of(node: fx.Node) -> str:
    """The path of the module that the node was called in."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(path) for path, _ in reversed(list(stack.values()))), "")
