"""Intermediate representation: graphs of operators with parameters by name, and how to change them."""
