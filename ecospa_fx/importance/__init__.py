"""Importance: what each unit of a coupling is worth, and what the others do to make up for its removal."""
