"""Which element of which tensor stands where, as expressions in positions and sizes."""
