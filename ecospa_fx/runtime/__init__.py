"""Running a graph: node by node, as generated code, and as a module that is called like the original."""
