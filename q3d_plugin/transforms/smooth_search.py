"""The search for SmoothQuant's alpha: the one under which a layer's quantized output has the least error."""

from collections.abc import Mapping, Sequence
from typing import Dict, List, Optional, Tuple

import torch
from torch import Tensor

from q3d_plugin import numerics
from q3d_plugin.calibration import InputSample, InputStatistics, is_unsigned, ranges_of_samples
from q3d_plugin.layers import QuantWeightLayer
from q3d_plugin.recipe import ActivationSpec
from q3d_plugin.transforms.smooth import Joint, Layers

__all__ = ['alphas_of', 'candidates', 'output_error', 'sum_errors']

ALWAYS = (0.25, 0.5, 0.75)
"""Values of alpha that every search tries."""

_SEARCHED = 2**14
"""Values of a sample that the range of an input is searched on."""


def candidates(grid: Sequence[float]) -> Tuple[Optional[float], ...]:
    """The values of alpha that are tried: the grid, :data:`ALWAYS`, and None, no smoothing at all.

    Examples:
        >>> candidates([0.5, 0.9])
        (None, 0.25, 0.5, 0.75, 0.9)
    """
    return (None, *sorted({*grid, *ALWAYS}))


def output_error(layer: QuantWeightLayer, sample: InputSample, scales: Sequence[Optional[Tensor]]) -> Tensor:
    """Squared error of a quantized layer's output, relative to its squared output, under several scales.

    The input has the range that calibration would give it.

    Args:
        layer: With the specs of its quantizers.
        sample: Of its input.
        scales: (C_in,) scales to try; None for ones.

    Returns:
        Tensor: (len(scales),) float64 errors.
    """
    weight = layer.kernel_view(layer.weight.detach()).float()
    groups, out_channels, in_channels, positions = weight.shape
    flat = sample.rows.reshape(len(sample.rows), groups, in_channels, positions)

    def product(x, w):
        x, w = x.flatten(2).transpose(0, 1), w.flatten(2)
        return torch.bmm(x, w.transpose(1, 2))

    reference = product(flat, weight)

    def weighed(y):
        return (y.double().square().sum((0, 2)) * sample.weights.double()).sum()

    energy = weighed(reference).clamp_min(1e-30)
    factors = [torch.ones_like(sample.amax) if scale is None else 1 / scale for scale in scales]
    spec = None if layer.input_quantizer is None else layer.input_quantizer.spec
    ranges = [None] * len(factors) if spec is None else _input_ranges(flat, sample, factors, spec)
    errors = []
    for factor, amax in zip(factors, ranges):
        by_group = factor.reshape(groups, in_channels)
        x, w = flat * by_group[None, :, :, None], weight / by_group[:, None, :, None]
        if spec is not None:
            axis = None if amax.dim() == 0 else 0
            x = numerics.fake_quantize(x, amax, spec.bits, is_unsigned(spec, sample.minimum), axis)
        if layer.weight_quantizer is not None:
            plan = layer.weight_quantizer.spec
            lines = w.reshape(groups * out_channels, -1)
            amax = numerics.weight_amax(lines, plan.bits, plan.calibrator, plan.percentile)
            w = numerics.fake_quantize(lines, amax, plan.bits, axis=0).reshape(w.shape)
        errors.append(weighed(product(x, w) - reference) / energy)
    return torch.stack(errors)


def _input_ranges(
    rows: Tensor, sample: InputSample, factors: Sequence[Tensor], spec: ActivationSpec
) -> List[Tensor]:
    """The range of the input under each of the factors: scalar, or (R,) where each tensor has its own.

    Args:
        rows: (R, groups, C_in / groups, K) those of ``sample``.
        sample: Of the input.
        factors: (C_in,) each; what the input is multiplied by.
        spec: Of the input's quantizer.
    """
    if spec.range == 'dynamic':
        return [(sample.amax_of_call * factor).amax(1) for factor in factors]
    values = rows.reshape(-1)
    # A step that is no multiple of a row takes values of every channel and position.
    step = max(1, len(values) // _SEARCHED) | 1
    index = torch.arange(0, len(values), step, device=rows.device)
    weights = sample.weights[index // rows[0].numel()]
    channel = index % rows[0].numel() // rows.shape[-1]
    values = torch.stack([values[index] * factor[channel] for factor in factors])
    amax = torch.stack([(sample.amax * factor).amax() for factor in factors])
    unsigned = is_unsigned(spec, sample.minimum)
    return list(ranges_of_samples(spec, values, weights, amax, unsigned))


def sum_errors(layers: Layers, joint: Joint, statistics: InputStatistics) -> Dict[str, Tensor]:
    """Errors of every layer whose alpha is searched, for every candidate.

    Args:
        layers: Those that are smoothed.
        joint: From :func:`joint_amax`.
        statistics: Of the inputs; layers without rows are left out.

    Returns:
        dict: Name -> (candidates,) float64 errors on the CPU.
    """
    errors = {}
    for name in joint.x_amax:
        spec = layers[name].smooth_spec
        if spec.alpha != 'search' or name not in statistics.rows:
            continue
        scales = [
            None
            if alpha is None
            else numerics.smoothing_scale(joint.x_amax[name], joint.weight_amax[name], alpha)
            for alpha in candidates(spec.grid)
        ]
        errors[name] = output_error(layers[name], statistics.sample(name), scales).cpu()
    return errors


def alphas_of(layers: Layers, joint: Joint, errors: Mapping[str, Tensor]) -> Dict[str, Optional[float]]:
    """The alpha of every layer: as the recipe says, or the one of least error summed over its group.

    Args:
        layers: Those that are smoothed.
        joint: From :func:`joint_amax`.
        errors: From :func:`sum_errors`, summed over ranks.

    Returns:
        dict: Name -> alpha; None for a layer that is better not smoothed.
    """
    alphas: Dict[str, Optional[float]] = {}
    for group in joint.groups:
        spec = layers[group[0]].smooth_spec
        alpha = spec.alpha
        if alpha == 'search':
            seen = [errors[n] for n in group if n in errors]
            alpha = candidates(spec.grid)[int(torch.stack(seen).sum(0).argmin())] if seen else None
        alphas.update(dict.fromkeys(group, alpha))
    return alphas
