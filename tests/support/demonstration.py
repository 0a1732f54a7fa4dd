"""The demonstration's model with one of its layers: it takes the same steps, in less time."""

from __future__ import annotations

from collections.abc import Callable

from ecospa_fx import demo


def shallow(load: Callable[[], demo.ByteLM] = demo.load) -> demo.ByteLM:
    model = load()
    model.layers = model.layers[:1]
    return model
