"""Ranges of a whole model in training: made parameters, moved, checked."""

from typing import List

import torch
import torch.distributed as dist
from torch import Tensor, nn

from q3d_plugin import numerics
from q3d_plugin.calibration import several_ranks
from q3d_plugin.errors import Q3DError
from q3d_plugin.layers import QuantWeightLayer
from q3d_plugin.layers.model import quantizers, units
from q3d_plugin.quantizer import Quantizer, Role
from q3d_plugin.recipe import RangesSpec

__all__ = [
    'check_ranges',
    'follow_weights',
    'keep_ranges',
    'learned',
    'move_ranges',
    'note_shares',
    'range_parameters',
    'train_ranges',
    'weight_layers',
]


def weight_layers(model: nn.Module) -> List[QuantWeightLayer]:
    """The layers whose weight has a range of its own, in the order of the model.

    That of a weight that is smoothed by scales from the running input goes with the scales.
    """
    return [
        unit
        for _, unit in units(model)
        if isinstance(unit, QuantWeightLayer)
        and unit.weight_quantizer is not None
        and unit.weight_quantizer.has_range
        and not (unit.smooth_spec and unit.smooth_spec.mode == 'dynamic')
    ]


def train_ranges(model: nn.Module, spec: RangesSpec) -> None:
    """Has every range of a calibrated model trained as the recipe says.

    Ranges that are not there at all stay so: those of layers that were left float, and dynamic ones. So does
    the range of a weight that is smoothed by scales from the running input, because it goes with the scales.

    Args:
        model: Calibrated.
        spec: Of the recipe.
    """
    weights = {layer.weight_quantizer for layer in weight_layers(model)}
    for quantizer in quantizers(model):
        if quantizer in weights:
            quantizer.train_range(spec.weight, log2=spec.scale == 'log2')
        elif quantizer.role is Role.ACTIVATION and quantizer.has_range:
            quantizer.train_range(spec.activation, log2=spec.scale == 'log2')


def keep_ranges(model: nn.Module) -> None:
    """Has every range stay what it is from now on, as a buffer."""
    for quantizer in quantizers(model):
        quantizer.train_range('fixed')


@torch.no_grad()
def note_shares(model: nn.Module) -> None:
    """Notes the ratio of fixed ranges of weights to their largest weights, where it is not noted yet.

    Not before the first step: a training that is resumed is set up before its weights are loaded.

    Args:
        model: After :func:`train_ranges`.
    """
    for layer in _following(model):
        quantizer = layer.weight_quantizer
        if quantizer.share_of_peak is None:
            quantizer.share_of_peak = _share(quantizer._amax, _peaks(layer))


def learned(model: nn.Module) -> List[Quantizer]:
    """The quantizers whose range is a parameter, in the order of the model."""
    return [q for q in quantizers(model) if q.range_parameter is not None]


def range_parameters(model: nn.Module) -> List[nn.Parameter]:
    """The ranges that are parameters, in the order of the model."""
    return [q.range_parameter for q in learned(model)]


def _peaks(layer: QuantWeightLayer) -> Tensor:
    return numerics.channel_amax(layer.output_first(layer.weight.detach()), 0)


def _share(amax: Tensor, peaks: Tensor) -> Tensor:
    """The ratio of ranges to largest weights, such that it can be found again from their product.

    It is rounded to 12 bits: then a training that is resumed, which knows the product alone, goes on with the
    very same numbers.
    """
    share = torch.where(peaks > 0, amax / peaks.clamp_min(torch.finfo(peaks.dtype).tiny), 1.0)
    mantissa, exponent = torch.frexp(share)
    return torch.ldexp((mantissa * 4096).round() / 4096, exponent)


def _following(model: nn.Module) -> List[QuantWeightLayer]:
    """Layers whose weight has a range of its own that is not learned."""
    return [layer for layer in weight_layers(model) if layer.weight_quantizer.trained != 'learned']


@torch.no_grad()
def follow_weights(model: nn.Module) -> None:
    """Sets the fixed ranges of weights anew: in each channel the same share of the largest weight.

    Args:
        model: After :func:`train_ranges`; ranges whose share is not noted stay what they are.
    """
    for layer in _following(model):
        quantizer = layer.weight_quantizer
        if quantizer.trained == 'fixed' and quantizer.share_of_peak is not None:
            quantizer._amax.copy_(quantizer.share_of_peak * _peaks(layer))


@torch.no_grad()
def move_ranges(model: nn.Module, momentum: float) -> None:
    """A step of all moving averages; every process makes the same one.

    Args:
        model: After :func:`train_ranges`.
        momentum: What stays of the old values.
    """
    for layer in _following(model):
        if layer.weight_quantizer.trained == 'moving':
            layer.weight_quantizer.move(_peaks(layer), momentum)
    moving = [q for q in quantizers(model) if q.trained == 'moving' and q.role is Role.ACTIVATION]
    if not moving:
        return
    # A process whose batch did not reach a layer has seen nothing there: -1.
    peaks = torch.stack([q._amax.new_tensor(-1.0) if q.peak is None else q.peak for q in moving])
    if several_ranks():
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    # A step towards itself leaves a range what it is; to look which ones were seen would wait for the device.
    ranges = torch.stack([q._amax for q in moving])
    for quantizer, peak in zip(moving, torch.where(peaks >= 0, peaks, ranges)):
        quantizer.move(peak, momentum)


def check_ranges(model: nn.Module) -> None:
    """Raises where a learned range is no positive number any more.

    Raises:
        Q3DError: The layer is named.
    """
    found = learned(model)
    if not found:
        return
    with torch.no_grad():
        least = torch.stack([q.current_range().amin() for q in found])
        sums = torch.stack([q.current_range().sum() for q in found])
    good = ((least > 0) & sums.isfinite()).tolist()
    bad = [q for q, fine in zip(found, good) if not fine]
    if bad:
        value = bad[0].current_range().detach()
        number = value.min().item() if bool(value.isfinite().all()) else float('nan')
        more = f' (and of {len(bad) - 1} more)' if len(bad) > 1 else ''
        raise Q3DError(
            f'the learned range of {bad[0].name!r}{more} became {number:g}, and nothing can be quantized '
            'by it; no checkpoint is written. A lower learning rate or recipe.training.ranges.lr_factor, '
            "or scale='log2', whose ranges stay positive, would work"
        )
