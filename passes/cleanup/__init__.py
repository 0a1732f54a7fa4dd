"""Passes that simplify a smaller graph without changing what it computes."""
