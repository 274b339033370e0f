"""Changes of a model, one algorithm a file."""
