"""Budget: from scores to the units that each coupling keeps, at a cost in parameters, FLOPs or seconds."""
