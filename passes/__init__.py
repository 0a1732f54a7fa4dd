"""Graph passes: graph in, graph out, one file each.

The names are imported when they are first asked for, so that importing one pass does not load all. What they are stands
in ``__init__.pyi``, for editors and type checkers.
"""

if __name__ != "ecospa_fx.passes":
    raise ImportError("the folder passes/ is installed as ecospa_fx.passes; import it by that name")

from importlib import import_module

_MEMBERS = {
    "CLEANUP": "passes.cleanup",
    "TRAINING_CLEANUP": "passes.cleanup",
    "CausalAttention": "passes.cleanup.causal_attention",
    "EqualWidths": "passes.cleanup.equal_widths",
    "FollowMode": "passes.cleanup.follow_mode",
    "GroupedAttention": "passes.cleanup.grouped_attention",
    "Pass": "ir.passes",
    "PassResult": "ir.passes",
    "RemoveInert": "passes.cleanup.remove_inert",
    "ShrinkCouplings": "passes.shrink.shrink_couplings",
    "run_passes": "ir.passes",
}
"""Where each public name is defined."""


def __getattr__(name: str) -> object:
    """A public name, whose module is imported first."""
    if name not in _MEMBERS:
        raise AttributeError(f"module 'ecospa_fx.passes' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"ecospa_fx.{_MEMBERS[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MEMBERS})
