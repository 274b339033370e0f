"""What quantization does to a detector: sensitivity of its layers, sweeps over recipes, a report of a run."""
