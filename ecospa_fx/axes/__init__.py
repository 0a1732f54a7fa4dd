"""Axes: which index sets every tensor axis of a graph carries, found by one rule per operator."""
