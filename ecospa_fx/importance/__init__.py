"""Importance: one score per unit over all members of its coupling at once."""
