"""Axes: the algebra of dims, one rule per operator, and the walk that applies them to a graph."""
