"""From a module to a graph, by torch.export."""
