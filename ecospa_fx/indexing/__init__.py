"""Indexing: which element of which tensor stands at each position, as expressions in the position."""
