"""Capture: from a module to a canonical graph, by `torch.export`."""
