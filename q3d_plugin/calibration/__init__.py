"""Statistics of activations, the pass that takes them, and the ranges that come out of them."""

from q3d_plugin.calibration.observer import MagnitudeHistogram
from q3d_plugin.calibration.ranges import compute_ranges
from q3d_plugin.calibration.run import collect

__all__ = ['MagnitudeHistogram', 'collect', 'compute_ranges']
