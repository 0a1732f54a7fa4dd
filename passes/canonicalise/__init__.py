"""Passes that bring a captured graph into the form that the rules of axes know."""
