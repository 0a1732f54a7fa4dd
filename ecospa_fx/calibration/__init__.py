"""Calibration text that a causal language model generates itself, and how far a smaller model is from the dense one."""

from ecospa_fx.calibration.distances import Distances as Distances
from ecospa_fx.calibration.distances import distances as distances
from ecospa_fx.calibration.generation import generated as generated
from ecospa_fx.calibration.generation import stream as stream
