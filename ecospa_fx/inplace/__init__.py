"""Shrinking the user's own module in place, with its configuration."""
