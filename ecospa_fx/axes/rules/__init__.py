"""The rules of operators, one file per family."""
