"""In place: a plan written back into the user's own module, and into the configuration that builds it."""
