"""Statistics of activations, the pass that takes them, and the ranges that come out of them."""

from q3d_plugin.calibration.inputs import InputStatistics
from q3d_plugin.calibration.observer import MagnitudeHistogram
from q3d_plugin.calibration.ranges import compute_ranges
from q3d_plugin.calibration.run import any_of_ranks, collect, evaluating, feed, from_all_ranks

__all__ = [
    'InputStatistics',
    'MagnitudeHistogram',
    'any_of_ranks',
    'collect',
    'compute_ranges',
    'evaluating',
    'feed',
    'from_all_ranks',
]
