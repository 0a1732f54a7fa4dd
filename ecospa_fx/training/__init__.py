"""Training: a model that gets physically smaller while it is being trained."""
