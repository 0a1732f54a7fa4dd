"""Graphs and how to change them; nothing here knows of axes or couplings."""
