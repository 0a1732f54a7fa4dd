"""Distillation: the smaller model learns the dense model's outputs on the calibration data."""
