"""Structured compression of any transformer: coupled weight pairs found by dataflow analysis, removed exactly.

The public names are imported when they are first asked for, so that importing this package loads no pass. What they are
stands in ``__init__.pyi``, for editors and type checkers.
"""

import sys
from importlib import import_module
from types import ModuleType

from ecospa_fx.version import __version__ as __version__

_MODULES = {
    "AtStart": "training.schedule",
    "Constant": "training.schedule",
    "Cubic": "training.schedule",
    "Linear": "training.schedule",
    "OneShot": "training.schedule",
    "OutputDistance": "importance.output_distance",
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


class _Package(ModuleType):
    """Keeps a verb where importing the module of the same name, such as `plan`, would put that."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


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
