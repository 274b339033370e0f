"""What quantization costs: time, memory and error of a model, float and quantized, measured in one run."""
