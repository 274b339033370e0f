"""Quantization-aware training: ranges, schedule and distillation, as far as they are the same everywhere."""

from q3d_plugin.training.session import QuantTraining

__all__ = ['QuantTraining']
