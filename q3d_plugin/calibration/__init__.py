"""Statistics of activations, the pass that takes them, and the ranges that come out of them."""

from q3d_plugin.calibration.inputs import InputSample, InputStatistics
from q3d_plugin.calibration.ranges import compute_ranges, is_unsigned, ranges_of_samples
from q3d_plugin.calibration.run import (
    any_of_ranks,
    collect,
    evaluating,
    feed,
    from_all_ranks,
    several_ranks,
)
from q3d_plugin.observer import MagnitudeHistogram

__all__ = [
    'InputSample',
    'InputStatistics',
    'MagnitudeHistogram',
    'any_of_ranks',
    'collect',
    'compute_ranges',
    'evaluating',
    'feed',
    'from_all_ranks',
    'is_unsigned',
    'ranges_of_samples',
    'several_ranks',
]
