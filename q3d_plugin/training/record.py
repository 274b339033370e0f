"""A record of a training: ranges, the share of clipped values, and that of weights whose integer changed."""

from typing import Any, Dict, List, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from q3d_plugin.calibration import several_ranks
from q3d_plugin.layers.model import quantizers
from q3d_plugin.numerics import bounds
from q3d_plugin.quantizer import Quantizer, Role
from q3d_plugin.trained_range import levels
from q3d_plugin.training.ranges import weight_layers

__all__ = ['SAMPLES', 'TrainingRecord', 'changed_codes', 'clipped_share', 'codes_of', 'share']

SAMPLES = 8
"""Steps of an epoch, evenly spaced, in which clipped inputs are counted."""


def share(part: float, whole: float) -> Optional[float]:
    """``part / whole``; None where there is nothing to have a part of."""
    return part / whole if whole else None


def codes_of(found: Tensor, low: int, high: int) -> Tensor:
    """The integers of a format, in the smallest type that holds them.

    Args:
        found: Rounded values, as :func:`q3d_plugin.trained_range.levels` gives them.
        low: The smallest integer.
        high: The largest integer.

    Returns:
        Tensor: Shape of ``found``; int8, int16 or int32.
    """
    fits = (t for t in (torch.int8, torch.int16) if torch.iinfo(t).min <= low and high <= torch.iinfo(t).max)
    return found.clamp(low, high).to(next(fits, torch.int32))


def clipped_share(found: Tensor, low: int, high: int) -> Tensor:
    """The share of values outside of a format, a scalar.

    Args:
        found: Rounded values, as :func:`q3d_plugin.trained_range.levels` gives them.
        low: The smallest integer.
        high: The largest integer.
    """
    return torch.count_nonzero((found < low) | (found > high)).double() / max(1, found.numel())


def changed_codes(before: Tensor, after: Tensor) -> Tensor:
    """The share of integers that are not what they were, a scalar.

    Args:
        before: Integers, as :func:`codes_of` gives them.
        after: Integers of the same shape.
    """
    return torch.count_nonzero(before != after).double() / max(1, after.numel())


class TrainingRecord:
    """Takes down, from time to time, what the training made of ranges and weights.

    It keeps one copy of the integers of all weights: a byte for each weight of up to 8 bits.

    Args:
        model: Calibrated, in training.

    Attributes:
        first: The record before the first step; None until then.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.first: Optional[Dict[str, Any]] = None
        self._codes: Dict[Quantizer, Tensor] = {}
        self._place: Optional[int] = None

    def sample_now(self, epoch: float) -> bool:
        """Says whether clipped inputs are counted in the coming step, and has the quantizers do it.

        Every process decides alike, since all are at the same point of the training.

        Args:
            epoch: Epochs since the start of training, with fractions.
        """
        # An epoch has SAMPLES places. The first step behind each of them is counted.
        place = int(epoch * SAMPLES + 1e-6)
        now = place != self._place
        self._place = place
        for quantizer in quantizers(self.model):
            quantizer.counting = now and quantizer.role is Role.ACTIVATION
        return now

    def start(self, epoch: float) -> None:
        """Takes down what there is before the first step; harmless when called again.

        Args:
            epoch: Epochs since the start of training, with fractions.
        """
        if self.first is None:
            self.first = self.finish_epoch(epoch)

    @torch.no_grad()
    def finish_epoch(self, epoch: float) -> Dict[str, Any]:
        """Takes down what there is now; every process has to call it.

        Args:
            epoch: Epochs since the start of training, with fractions.

        Returns:
            dict: ``epoch``; ``totals`` over all values, which are ``clipped_activations``,
            ``clipped_weights`` and ``changed_codes``; and ``layers``, for each quantizer that has a range
            ``name``, ``tensor`` (``'input'`` or ``'weight'``), ``range`` (of a weight the mean of its
            channels), ``clipped``, ``changed`` (of weights) and ``values``, the number of values looked at.
            Shares are from 0 to 1, and None where nothing was counted. Inputs are those that were counted
            since the last record; ``changed`` is since then, too.
        """
        rows = [*self._inputs(), *self._weights()]
        totals = {
            'clipped_activations': _total(rows, 'input', 'clipped'),
            'clipped_weights': _total(rows, 'weight', 'clipped'),
            'changed_codes': _total(rows, 'weight', 'changed'),
        }
        return {'epoch': int(epoch) if epoch == int(epoch) else epoch, 'totals': totals, 'layers': rows}

    def _inputs(self) -> List[Dict[str, Any]]:
        found = [q for q in quantizers(self.model) if q.role is Role.ACTIVATION and q.has_range]
        if not found:
            return []
        ranges = torch.stack([q.current_range() for q in found])
        nothing = torch.zeros(2, dtype=torch.long, device=ranges.device)
        counts = torch.stack([nothing if q.clipped is None else q.clipped for q in found])
        if several_ranks():
            dist.all_reduce(counts)
        for quantizer in found:
            quantizer.clipped = None
        return [
            _row(quantizer, amax, share(clipped, number), None, number)
            for quantizer, amax, (clipped, number) in zip(found, ranges.tolist(), counts.tolist())
        ]

    def _weights(self) -> List[Dict[str, Any]]:
        layers, found, known = weight_layers(self.model), [], []
        for layer in layers:
            quantizer = layer.weight_quantizer
            low, high = bounds(quantizer.num_bits, quantizer.unsigned)
            amax = quantizer.current_range()
            rounded = levels(layer.output_first(layer.weight), amax, high, axis=0)
            codes, before = codes_of(rounded, low, high), self._codes.get(quantizer)
            changed = amax.new_zeros(()) if before is None else changed_codes(before, codes)
            self._codes[quantizer] = codes
            known.append(before is not None)
            found.append(
                torch.stack([n.double() for n in (amax.mean(), clipped_share(rounded, low, high), changed)])
            )
        # Read at one go, since reading waits for a CUDA device.
        numbers = torch.stack(found).tolist() if found else []
        return [
            _row(layer.weight_quantizer, amax, clipped, changed if there else None, layer.weight.numel())
            for layer, there, (amax, clipped, changed) in zip(layers, known, numbers)
        ]


def _row(quantizer: Quantizer, amax: float, clipped: Any, changed: Any, values: int) -> Dict[str, Any]:
    return {
        'name': quantizer.owners[0] if quantizer.owners else quantizer.name,
        'tensor': 'input' if quantizer.role is Role.ACTIVATION else 'weight',
        'range': amax,
        'clipped': clipped,
        'changed': changed,
        'values': values,
    }


def _total(rows: List[Dict[str, Any]], tensor: str, key: str) -> Optional[float]:
    """The share of all values, from the shares of the layers."""
    known = [row for row in rows if row['tensor'] == tensor and row[key] is not None]
    return share(sum(row[key] * row['values'] for row in known), sum(row['values'] for row in known))
