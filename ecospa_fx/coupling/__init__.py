"""Couplings: dims of parameters that can only be removed together, or why they cannot be."""
