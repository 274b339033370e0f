"""SmoothQuant of a whole model: the pass that takes its statistics, and what is done with them."""

import copy
import logging
from collections.abc import Callable, Iterable
from typing import Any, Dict, Optional

from torch import nn

from q3d_plugin.calibration import InputStatistics, evaluating, feed, from_all_ranks
from q3d_plugin.errors import Q3DError
from q3d_plugin.layers import QuantWeightLayer
from q3d_plugin.layers.model import quantizers, switched, units
from q3d_plugin.transforms import smooth, smooth_search
from q3d_plugin.transforms.graph import graph_of, tensors_in

__all__ = ['READ_ONCE', 'smooth_model']

READ_ONCE = (
    'calibration: {} was given, which can be read once; SmoothQuant reads the batches twice, so a list or a '
    'loader would work'
)


def smooth_model(
    model: nn.Module, batches: Iterable, forward: Callable, names: Optional[Callable], logger: logging.Logger
) -> int:
    """Smooths the layers that the recipe wants smoothed, and gives the number of batches that it read.

    What the model computes in float stays the same.
    """
    layers = {name: unit for name, unit in units(model) if isinstance(unit, QuantWeightLayer)}
    wanted = {name: layer for name, layer in layers.items() if layer.smooth_spec is not None}
    if not wanted:
        return 0
    if iter(batches) is batches:
        raise Q3DError(READ_ONCE.format(type(batches).__name__))
    searched = [n for n, unit in wanted.items() if unit.smooth_spec.alpha == 'search' and unit.searchable]
    graph, statistics = graph_of(model), InputStatistics(layers, searched)
    first: Dict[str, Any] = {}

    def watched(batch):
        if not first:
            # Kept for the probe; a forward pass may write into its batch.
            first['batch'] = copy.deepcopy(batch)
        with graph.watching() as watch:
            returned = forward(batch)
            watch.returned(returned)
        if 'seen' not in first:
            values = [t.detach().clone() for t in tensors_in(returned)]
            first['seen'] = dict(statistics.amax), values

    def again():
        probe, batch = InputStatistics(layers), copy.deepcopy(first['batch'])
        with probe.attached(), evaluating(model):
            returned = list(tensors_in(forward(batch)))
        return probe.amax, returned

    with switched(quantizers(model), False):
        with statistics.attached():
            seen = feed(model, batches, watched, statistics.infinite, names)
        if seen == 0:
            return 0
        statistics.merge_ranks()
        for other in from_all_ranks(graph.state()):
            graph.merge(other)
        smooth.agree_(graph, layers)
        if smooth.probe_(graph, layers, again if first else None, first.get('seen'), from_all_ranks):
            logger.warning(
                'SmoothQuant: outputs of some layers are read by code that cannot be watched, so scales of '
                'the layers that follow stay explicit multiplications (see the coverage table)'
            )
    joint = smooth.joint_amax(graph, wanted, statistics.amax)
    errors: Dict[str, Any] = {}
    for mine in from_all_ranks(smooth_search.sum_errors(wanted, joint, statistics)):
        for name, error in mine.items():
            errors[name] = errors[name] + error if name in errors else error
    smooth.smooth_(graph, layers, joint, smooth_search.alphas_of(wanted, joint, errors))
    return seen
