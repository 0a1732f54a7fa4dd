"""Passes that change what a model computes, or prepare for it; only by request."""

from ecospa_fx.passes.lossy.change_basis import ChangeBasis as ChangeBasis
from ecospa_fx.passes.lossy.reconstruct import Reconstruct as Reconstruct
