"""The origin of a shrunk model, such as its plan and its class: noted on the model by `shrink`, read by `save`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ecospa_fx.errors import PlanError
from ecospa_fx.example_inputs import describe
from ecospa_fx.plan import Plan
from ecospa_fx.wrappers import unwrapped

ATTRIBUTE = "ecospa_origin"


@dataclass(frozen=True, slots=True)
class Origin:
    """What is needed to build a shrunk model again, besides its weights."""

    plan: Plan
    """What was removed."""
    model_class: str
    """Qualified name of the original model's class."""
    config: str | None
    """JSON of a transformers model's configuration; None for other models."""
    attention: str | None
    """The attention implementation of a transformers model."""
    inputs: object
    """Example inputs without their values, see `ecospa_fx.example_inputs`; None where they cannot be described."""
    buffers: tuple[str, ...]
    """Names of the original model's buffers."""
    training: bool
    """Whether the model was in training mode."""
    integers: object = None
    """The integers that `shrink_` wrote into the module, as JSON; None for a graph."""
    parts: tuple[str, ...] = ()
    """Paths of the modules that alone were made smaller; empty for the whole."""


def origin(
    model: nn.Module,
    plan: Plan,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    parts: tuple[str, ...] = (),
) -> Origin:
    """The origin of what ``shrink(model, plan, args, kwargs, part=parts)`` returns."""
    model = unwrapped(model)
    kind, config = type(model), getattr(model, "config", None)
    configured = kind.__module__.startswith("transformers.models.") and hasattr(config, "to_json_string")
    try:
        inputs = describe((tuple(args), dict(kwargs or {})))
    except TypeError:
        inputs = None
    return Origin(
        plan=plan,
        model_class=f"{kind.__module__}.{kind.__qualname__}",
        config=config.to_json_string() if configured and config is not None else None,
        attention=getattr(config, "_attn_implementation", None) if configured else None,
        inputs=inputs,
        buffers=tuple(name for name, _ in model.named_buffers()),
        training=model.training,
        parts=parts,
    )


def remember(small: nn.Module, origin: Origin) -> nn.Module:
    """Note on a shrunk model where it came from, so that ``save(small, path)`` needs nothing else. Returns it."""
    setattr(small, ATTRIBUTE, origin)
    return small


def origin_of(small: nn.Module) -> Origin:
    """Where a model that `shrink` or `compress` returned came from. Raises PlanError for any other."""
    noted = getattr(unwrapped(small), ATTRIBUTE, None)
    if not isinstance(noted, Origin):
        raise PlanError(f"{type(small).__name__} does not come from ecospa_fx.shrink or ecospa_fx.compress")
    return noted
