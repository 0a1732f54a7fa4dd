"""Runtime: running a graph node by node, and turning it back into a tree of modules."""
