"""Structured compression of any transformer: coupled weight pairs found by dataflow analysis, removed exactly.

The public names are imported when they are first asked for, so that importing this package loads no pass. What they are
stands in ``__init__.pyi``, for editors and type checkers.
"""

from importlib import import_module

from ecospa_fx.version import __version__ as __version__

_MODULES = {
    "AtStart": "training.schedule",
    "Constant": "training.schedule",
    "Cubic": "training.schedule",
    "Linear": "training.schedule",
    "OneShot": "training.schedule",
    "Plan": "plan",
    "Scores": "importance.scores",
    "Selection": "plan",
    "SparseTraining": "training.sparse",
    "axis_rule": "axes.registry",
    "backend": "torch_compile",
    "compress": "api",
    "compress_": "api",
    "detect": "api",
    "export": "export.verb",
    "load": "storage.models",
    "plan": "planning",
    "report": "report.verb",
    "save": "storage.models",
    "score": "importance.score",
    "shrink": "api",
    "shrink_": "inplace.shrink",
}
"""Where each public name is defined."""


# Imported now, because importing a submodule puts it into the package, where the verb of the same name has to be.
for _verb in ("export", "plan", "report"):
    import_module(f"ecospa_fx.{_verb}")
    del globals()[_verb]


def __getattr__(name: str) -> object:
    """A public name, or a module of the package, which is imported first."""
    if name in _MODULES:
        globals()[name] = value = getattr(import_module(f"ecospa_fx.{_MODULES[name]}"), name)
        return value
    path = f"ecospa_fx.{name}"
    try:
        return import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
    raise AttributeError(f"module 'ecospa_fx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
