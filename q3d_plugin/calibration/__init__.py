"""Statistics of activations, the pass that takes them, and the ranges that come out of them."""

from q3d_plugin.calibration.observer import MagnitudeHistogram
from q3d_plugin.calibration.ranges import compute_ranges
from q3d_plugin.calibration.run import any_of_ranks, collect

__all__ = ['MagnitudeHistogram', 'any_of_ranks', 'collect', 'compute_ranges']
