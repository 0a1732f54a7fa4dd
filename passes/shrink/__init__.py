"""The pass that removes what a plan removes, and what it needs."""
