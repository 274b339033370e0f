"""The effects of quantization on a detector: sensitivity of layers, sweeps over recipes, reports of runs."""
