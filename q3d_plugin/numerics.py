"""The mathematics of quantization as pure functions: fake quantization, range search, error measures.

Everything is symmetric: the zero point is 0, and a range is one positive number ``amax`` that maps to the
largest integer. Notation: ``amax`` (range), ``scale = amax / qmax`` (step), ``bits``.
"""

from typing import Optional, Tuple, Union

import torch
from torch import Tensor

from q3d_plugin import kernel, scratch, straight_through

__all__ = [
    'bounds',
    'channel_amax',
    'dequantized_levels',
    'extremes',
    'fake_quantize',
    'native_fake_quantize',
    'search_entropy',
    'search_mse',
    'search_percentile',
    'smoothing_scale',
    'sqnr_db',
    'weight_amax',
]

# A scale below this would overflow when it is inverted; a channel of zeros has one.
_TINY = 1e-30


def extremes(x: Tensor, dim: Optional[int] = None) -> Tensor:
    """Smallest and largest element.

    Args:
        x: Any shape but an empty one, floating point.
        dim: The axis to look along; None for all elements.

    Returns:
        Tensor: (2,) or (2, ...) with the other axes of ``x``, of its dtype or a wider one.
    """
    # In torch 2.1 aten::aminmax has no kernels for half precision on the CPU.
    wider = x.dtype in (torch.float16, torch.bfloat16) and x.device.type == 'cpu'
    return torch.stack(torch.aminmax(x.float() if wider else x, dim=dim))


def bounds(bits: int, unsigned: bool = False) -> Tuple[int, int]:
    """Smallest and largest integer of a format.

    Signed formats have one more step below zero than above it, as ONNX's and TensorRT's int8 have.

    Args:
        bits: Width, 2 to 16.
        unsigned: Whether the format starts at zero.

    Examples:
        >>> bounds(8), bounds(8, unsigned=True), bounds(4)
        ((-128, 127), (0, 255), (-8, 7))
    """
    if unsigned:
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def fake_quantize(
    x: Tensor,
    amax: Tensor,
    bits: int,
    unsigned: bool = False,
    axis: Optional[int] = None,
    inplace: bool = False,
    factor: float = 1.0,
) -> Tensor:
    """Rounds ``x`` to the grid of an integer format and back; gradients pass straight through inside the
    range, and to ``amax`` where it requires one (:mod:`q3d_plugin.straight_through`).

    Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", equation 12, with zero point 0. Without gradients a chain of in-place operations is used on
    the CPU, which is about four times as fast there as torch's own kernel and gives the same numbers. On CUDA
    the chain would pass over memory four times, and torch's kernel once. That kernel makes a number of NaN,
    which the chain keeps. Large results on the CPU lie in memory that was used before
    (:mod:`q3d_plugin.scratch`) and belongs to whoever holds them.

    Args:
        x: Any shape, floating point.
        amax: Range; a scalar tensor, or one number per index of ``axis``.
        bits: Width, 2 to 16.
        unsigned: Whether the integers start at zero; negative values become 0.
        axis: The axis that has ranges of its own; None for one range for all.
        inplace: Write the result into ``x``, which saves its copy; only where no gradients are wanted.
        factor: Of the gradient of ``amax``.

    Returns:
        Tensor: Shape and dtype of ``x``.

    Examples:
        >>> fake_quantize(torch.tensor([-0.3, 0.26, 9.0]), torch.tensor(7.0), bits=4)
        tensor([-0., 0., 7.])
    """
    low, high = bounds(bits, unsigned)
    scale = (amax.detach().to(x.device, torch.float32) / high).clamp_min(_TINY)
    if torch.is_grad_enabled() and (x.requires_grad or amax.requires_grad):
        return straight_through.fake_quantize(x, amax, scale, axis, low, high, factor)
    half, fast = x.dtype in (torch.float16, torch.bfloat16), kernel.is_fast(x.device.type, x.dtype)
    if half and not (fast and axis is None):
        # The inverse of a small step overflows in half precision, and 0 * inf is NaN.
        return fake_quantize(x.float(), amax, bits, unsigned, axis).to(x.dtype)
    if half or (fast and not inplace):
        return kernel.fake_quantize(x, scale, axis, low, high)
    if axis is not None:
        shape = [1] * x.dim()
        shape[axis] = -1
        scale = scale.reshape(shape)
    inverse = 1.0 / scale
    if axis is None and x.numel() >= scratch.LARGE:
        out = scratch.rounded(x, inverse.to(x.dtype), scale.to(x.dtype), low, high, inplace)
        if out is not None:
            return out
    scaled = x.mul_(inverse.to(x.dtype)) if inplace else x * inverse.to(x.dtype)
    return scaled.round_().clamp_(low, high).mul_(scale.to(x.dtype))


def native_fake_quantize(
    x: Tensor, amax: Tensor, bits: int, unsigned: bool = False, axis: Optional[int] = None
) -> Tensor:
    """As :func:`fake_quantize`, by torch's own operator, which an ONNX export turns into Q/DQ.

    The exporter knows formats of 8 bits.

    Args:
        x: Any shape, floating point.
        amax: Range; a scalar tensor, or one number per index of ``axis``.
        bits: Width, 2 to 16.
        unsigned: Whether the integers start at zero.
        axis: The axis that has ranges of its own; None for one range for all.
    """
    low, high = bounds(bits, unsigned)
    scale = (amax.detach().to(torch.float32) / high).clamp_min(_TINY)
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, float(scale), 0, low, high)
    zero = torch.zeros_like(scale.reshape(-1), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(x, scale.reshape(-1), zero, axis, low, high)


def dequantized_levels(x: Tensor, scale: Tensor, high: int) -> Tensor:
    """``x`` (not negative) after rounding to ``scale * (0..high)``; broadcasts."""
    return (x / scale).round_().clamp_(max=high).mul_(scale)


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in decibel: ``10 log10(sum r^2 / sum (r - a)^2)``."""
    noise = (reference.double() - approximation.double()).square().sum()
    signal = reference.double().square().sum()
    if noise == 0:
        return float('inf')
    return float(10 * torch.log10(signal / noise))


# Scales outside of these would overflow where a float16 weight or input meets them.
_SCALES = (1e-4, 1e4)


def channel_amax(x: Tensor, axis: int) -> Tensor:
    """Largest magnitude for every index of ``axis``; zeros where ``x`` is empty.

    Args:
        x: Any shape, floating point.
        axis: The axis that is kept.

    Returns:
        Tensor: (x.shape[axis],).
    """
    others = [i for i in range(x.dim()) if i != axis % x.dim()]
    if x.numel() == 0:
        return x.new_zeros(x.shape[axis])
    # Not x.abs(): it would be a copy of the largest tensors of a detector.
    return torch.maximum(x.amax(others), -x.amin(others)) if others else x.abs()


def smoothing_scale(x_amax: Tensor, weight_amax: Tensor, alpha: Union[float, Tensor]) -> Tensor:
    """What inputs are divided and weights multiplied by: Xiao et al. 2023 (SmoothQuant), equation 4.

    ``s = max|X|^alpha / max|W|^(1 - alpha)`` for each input channel, within 1e-4 and 1e4. A channel that is
    dead in the input or has no weight keeps its scale: 1.

    Args:
        x_amax: (C,) largest magnitudes of the input.
        weight_amax: (C,) largest magnitudes of the weight.
        alpha: 0 to 1.

    Examples:
        >>> smoothing_scale(torch.tensor([16.0, 0.0]), torch.tensor([0.25, 1.0]), 0.5)
        tensor([8., 1.])
    """
    dead = (x_amax <= 0) | (weight_amax <= 0)
    scale = x_amax.clamp_min(_TINY) ** alpha / weight_amax.clamp_min(_TINY) ** (1 - alpha)
    return torch.where(dead, torch.ones_like(scale), scale.clamp(*_SCALES))


def _centres(counts: Tensor, top: Tensor) -> Tensor:
    """Centres of the bins of histograms over ``[0, top]``: (R, B) for (R, B) counts and (R,) tops."""
    bins = counts.shape[-1]
    grid = torch.arange(bins, device=counts.device, dtype=torch.float32) + 0.5
    return grid[None] * (top[:, None] / bins)


def search_percentile(counts: Tensor, top: Tensor, amax: Tensor, percentile: float) -> Tensor:
    """The range that ``percentile`` per cent of all magnitudes lie below, never above ``amax``.

    Args:
        counts: (R, B) histograms of magnitudes over ``[0, top]``.
        top: (R,) upper ends of the histograms.
        amax: (R,) largest magnitudes seen.
        percentile: In ``(0, 100]``.

    Returns:
        Tensor: (R,) ranges.
    """
    # On CUDA cumsum raises where algorithms have to be deterministic.
    cumulated = counts.double().cpu().cumsum(-1).to(counts.device)
    wanted = cumulated[:, -1:] * (percentile / 100.0)
    index = torch.searchsorted(cumulated, wanted)[:, 0].clamp_max(counts.shape[-1] - 1)
    width = top / counts.shape[-1]
    return torch.minimum((index.to(top) + 1) * width, amax)


def _mse(
    counts: Tensor, values: Tensor, amax: Tensor, high: Tensor, width: Optional[Tensor] = None
) -> Tensor:
    """Squared error of (R, B) histograms under (R, K) candidate ranges, summed over bins: (R, K).

    A loop over the K candidates, each one vectorised over all rows and bins, keeps the memory at that of the
    histograms.

    Args:
        counts: (R, B), or a scalar where every value counts once.
        values: (R, B) one magnitude for each bin.
        amax: (R, K) candidate ranges.
        high: (R,) largest integers.
        width: (R,) widths of the bins. Where a step is not much wider than a bin, one value can't tell the
            rounding error of the bin; it is taken as that of evenly spread values then, ``step**2 / 12``.
    """
    errors = []
    for k in range(amax.shape[1]):
        scale = (amax[:, k : k + 1] / high[:, None]).clamp_min(_TINY)
        rounded = torch.minimum((values / scale).round_(), high[:, None]).mul_(scale)
        error = rounded.sub_(values).square_()
        if width is not None:
            coarse = scale < 4 * width[:, None]
            if coarse.any():
                inside = coarse & (values <= amax[:, k : k + 1])
                error = torch.where(inside, (scale.square() / 12).expand_as(error), error)
        errors.append(error.mul_(counts).sum(-1))
    return torch.stack(errors, dim=1)


def search_mse(
    counts: Tensor,
    top: Tensor,
    amax: Tensor,
    high: Tensor,
    lowest: float = 0.2,
    steps: int = 81,
    light: bool = False,
    means: Optional[Tensor] = None,
) -> Tensor:
    """The range of least squared error between values and fake-quantized values.

    Candidates are ``amax * f`` with ``steps`` factors ``f`` from ``lowest`` to 1. A range below ``amax`` has
    to win by half a per cent, because a bin knows one value only; the caller checks it on the values
    themselves where it has them (:func:`q3d_plugin.calibration.ranges.compute_ranges`).

    ``light=True`` is the light search of LiDAR-PTQ (Zhou et al., ICLR 2024, section 3.2: max-min
    calibration, then a small grid around it): 16 coarse candidates, then 8 between the neighbours of the
    best one. The best grid point is the same where the error has one valley.

    Args:
        counts: (R, B) histograms of magnitudes over ``[0, top]``, zeros included or not (they cause no
            error).
        top: (R,) upper ends of the histograms.
        amax: (R,) largest magnitudes seen.
        high: (R,) largest integers, e.g. 127 or 255.
        lowest: Smallest candidate as a fraction of ``amax``.
        steps: Number of candidates.
        light: Search coarse to fine instead of all candidates.
        means: (R, B) mean magnitude in each bin; the centres of the bins where None.

    Returns:
        Tensor: (R,) ranges.
    """
    counts = counts.to(torch.float32)
    values = _centres(counts, top) if means is None else means.to(torch.float32)
    bin_width = top / counts.shape[-1]
    high = high.to(torch.float32)
    one = torch.ones_like(amax)[:, None]
    whole = _mse(counts, values, amax[:, None], high, bin_width)

    if light:
        coarse = torch.linspace(lowest, 1.0, 17, device=amax.device)[:-1]
        errors = _mse(counts, values, amax[:, None] * coarse, high, bin_width)
        best = coarse[errors.argmin(1)][:, None]
        width = (1.0 - lowest) / 16
        fine = best + width * torch.linspace(-1, 1, 9, device=amax.device)[None]
        factors = torch.cat([fine.clamp(lowest, 1.0), one], dim=1)
    else:
        factors = torch.linspace(lowest, 1.0, steps, device=amax.device)[None].expand(len(amax), -1)
    errors = _mse(counts, values, amax[:, None] * factors, high, bin_width)
    least, index = errors.min(dim=1)
    chosen = factors.gather(1, index[:, None])[:, 0]
    return torch.where(least < 0.995 * whole[:, 0], amax * chosen, amax)


def search_entropy(counts: Tensor, top: Tensor, amax: Tensor, high: Tensor, steps: int = 61) -> Tensor:
    """The range of least Kullback-Leibler divergence between the clipped histogram and its quantized form.

    Migacz 2017, "8-bit Inference with TensorRT". For each candidate the histogram is cut (what lies outside
    goes to the last bin), the bins are merged into ``high + 1`` levels, each level's mass is spread over
    those of its bins that are not empty, and the divergence of the two distributions is compared. The bin of
    zeros takes no part.

    Entropy does not suit LiDAR features (Zhou et al., ICLR 2024, table 1: 38 points of mAP lost); it is here
    for camera branches and for comparison.

    Args:
        counts: (R, B) histograms of magnitudes over ``[0, top]``.
        top: (R,) upper ends of the histograms.
        amax: (R,) largest magnitudes seen.
        high: (R,) largest integers, e.g. 127 or 255.
        steps: Number of candidates, from a quarter of ``amax`` to ``amax``.

    Returns:
        Tensor: (R,) ranges.
    """
    counts = counts.to(torch.float64).clone()
    counts[:, 0] = 0
    rows, bins = counts.shape
    levels = int(high.max()) + 1
    index = torch.arange(bins, device=counts.device)
    factors = torch.linspace(0.25, 1.0, steps, device=amax.device)
    width = top / bins
    best = torch.full_like(amax, float('inf'), dtype=torch.float64)
    chosen = amax.clone()
    total = counts.sum(-1, keepdim=True)
    for factor in reversed(factors.tolist()):
        # Bins inside the candidate range; at least one level's worth, at most all.
        inside = torch.ceil(amax * factor / width).long().clamp(1, bins)
        kept = index[None] < inside[:, None]
        reference = counts * kept
        outside = total[:, 0] - reference.sum(-1)
        level = torch.div(index[None] * (high[:, None] + 1).long(), inside[:, None], rounding_mode='floor')
        level = level.clamp(max=levels - 1)
        filled = (reference > 0).to(torch.float64)
        mass = torch.zeros(rows, levels, dtype=torch.float64, device=counts.device)
        mass.scatter_add_(1, level, reference)
        number = torch.zeros_like(mass).scatter_add_(1, level, filled)
        spread = (mass / number.clamp_min(1)).gather(1, level) * filled
        reference.scatter_add_(1, (inside - 1)[:, None], outside[:, None])
        p = reference / reference.sum(-1, keepdim=True).clamp_min(1)
        q = spread / spread.sum(-1, keepdim=True).clamp_min(1)
        # Where the reference has mass and the quantized form none, the divergence would be infinite: the
        # last bin of a cut through empty bins. A small floor keeps such candidates comparable and bad.
        divergence = torch.where(p > 0, p * (p.clamp_min(1e-12) / q.clamp_min(1e-12)).log(), 0.0).sum(-1)
        better = divergence < best - 1e-12
        best = torch.where(better, divergence, best)
        chosen = torch.where(better, amax * factor, chosen)
    return chosen


def weight_amax(weight: Tensor, bits: int, calibrator: str = 'max', percentile: float = 99.99) -> Tensor:
    """Ranges of a weight whose output channel is axis 0, one per output channel.

    Weights are at hand as a whole, so every calibrator looks at the values themselves.

    Args:
        weight: (C, ...) weight, output channel first.
        bits: Width of the signed format.
        calibrator: ``'max'``, ``'percentile'``, ``'mse'``, ``'grid'`` or ``'entropy'``. Entropy has too few
            values in one channel to be of use and is refused by the recipe.
        percentile: For ``'percentile'``.

    Returns:
        Tensor: (C,) ranges.
    """
    rows = weight.detach().to(torch.float32).reshape(weight.shape[0], -1).abs()
    amax = rows.amax(dim=1)
    if calibrator == 'max':
        return amax
    if calibrator == 'percentile':
        rank = max(1, min(rows.shape[1], round(rows.shape[1] * percentile / 100.0 + 0.5)))
        if rows.is_cuda:
            # kthvalue raises there where algorithms have to be deterministic.
            return rows.sort(dim=1).values[:, rank - 1]
        return rows.kthvalue(rank, dim=1).values
    high = torch.full_like(amax, bounds(bits)[1])
    ones = rows.new_ones(())
    steps = 14 if calibrator == 'grid' else 41
    factors = torch.linspace(0.5 if bits >= 8 else 0.2, 1.0, steps, device=rows.device)
    errors = _mse(ones, rows, amax[:, None] * factors, high)
    return amax * factors[errors.argmin(1)]
