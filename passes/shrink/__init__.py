"""The pass that removes what a plan removes."""
