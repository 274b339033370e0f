"""Survey of all configs of a framework: what builds quantized, how much of it, what is float when off."""
