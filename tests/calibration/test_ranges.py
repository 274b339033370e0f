"""Ranges of several quantizers at once, against searches on the data themselves."""

import numpy as np
import pytest
import torch

from q3d_plugin import numerics
from q3d_plugin.calibration import compute_ranges
from q3d_plugin.quantizer import Mode, Quantizer
from q3d_plugin.recipe import ActivationSpec


def observing(frames, **fields):
    quantizer = Quantizer(ActivationSpec(**fields))
    quantizer.observe()
    for frame in frames:
        quantizer(frame)
    return quantizer


def data_error(quantizer, frames, amax=None):
    """Mean squared error on the data, by torch's kernel."""
    low, high = numerics.bounds(quantizer.num_bits, quantizer.mode is Mode.UNSIGNED)
    x = torch.cat([f.flatten() for f in frames])
    amax = quantizer._amax.item() if amax is None else amax
    return float((torch.fake_quantize_per_tensor_affine(x, amax / high, 0, low, high) - x).square().mean())


FRAMES = dict(
    relu=lambda: [torch.randn(3000).relu() for _ in range(3)],
    outlier=lambda: [torch.randn(3000), torch.tensor([-60.0]), torch.randn(9000)],
    signed=lambda: [torch.randn(3000) * 5 for _ in range(3)],
    heavy=lambda: [torch.distributions.StudentT(2.0).sample((3000,)) for _ in range(3)],
    sparse=lambda: [torch.randn(3000).relu() * (torch.rand(3000) < 0.05) for _ in range(3)],
)


@pytest.mark.parametrize('name', FRAMES)
@pytest.mark.parametrize('bits', [4, 8])
@pytest.mark.parametrize('calibrator', ['mse', 'grid', 'max', 'percentile', 'entropy'])
def test_each_calibrator_does_on_frames_what_it_promises(name, bits, calibrator):
    frames = FRAMES[name]()
    quantizer = observing(frames, bits=bits, calibrator=calibrator, percentile=99.0)
    assert compute_ranges([quantizer]) == []
    magnitudes = torch.cat(frames).abs()
    largest, got = float(magnitudes.max()), quantizer._amax.item()
    assert quantizer.mode is (Mode.UNSIGNED if name in ('relu', 'sparse') else Mode.SIGNED)
    assert not quantizer.observing
    assert 0 < got <= largest * (1 + 1e-6)
    if calibrator == 'max':
        assert got == largest
    elif calibrator == 'percentile':
        expected = np.percentile(magnitudes.numpy(), 99, method='inverted_cdf')
        assert expected - 1e-6 <= got <= expected + 2 * largest / 4096 + 1e-6
    elif calibrator in ('mse', 'grid'):
        candidates = torch.linspace(0.2 if bits == 8 else 0.05, 1, 81).tolist()
        least = min(data_error(quantizer, frames, largest * f) for f in candidates)
        assert data_error(quantizer, frames) <= least * 1.03
        assert data_error(quantizer, frames) <= data_error(quantizer, frames, largest) * (1 + 1e-6)
    else:
        assert 0.249 * largest < got


def test_quantizers_of_different_calibrators_and_bits_do_not_disturb_each_other():
    specs = [
        dict(calibrator=c, bits=b, percentile=p)
        for c, p in (
            ('max', 99.0),
            ('mse', 99.0),
            ('entropy', 99.0),
            ('percentile', 90.0),
            ('percentile', 99.0),
        )
        for b in (8, 10)
    ]
    frames = [[torch.randn(500) * 10.0**i] for i in range(len(specs))]
    together = [observing(f, **s) for f, s in zip(frames, specs)]
    alone = [observing(f, **s) for f, s in zip(frames, specs)]
    assert compute_ranges(together) == []
    for one, other in zip(alone, together):
        compute_ranges([one])
        assert torch.equal(one._amax, other._amax) and one.mode is other.mode


def test_a_neighbour_of_few_bits_does_not_change_a_range():
    frames = [torch.distributions.StudentT(1.5).sample((5000,))]
    alone = observing(frames, bits=8)
    compute_ranges([alone])
    pair = [observing(frames, bits=8), observing(frames, bits=4)]
    compute_ranges(pair)
    assert torch.equal(pair[0]._amax, alone._amax)


@pytest.mark.parametrize(
    'given, low, expected',
    [
        ('auto', 0.0, Mode.UNSIGNED),
        ('auto', -1e-6, Mode.SIGNED),
        (True, -1.0, Mode.UNSIGNED),
        (False, 0.0, Mode.SIGNED),
    ],
)
def test_signedness_is_as_given_or_as_seen(given, low, expected):
    quantizer = observing([torch.tensor([low, 2.0]), torch.tensor([1.0, 5.0])], unsigned=given)
    compute_ranges([quantizer])
    assert quantizer.mode is expected


def test_one_negative_value_in_one_frame_is_enough():
    frames = [torch.rand(100) for _ in range(5)]
    frames[3][50] = -0.01
    quantizer = observing(frames)
    compute_ranges([quantizer])
    assert quantizer.mode is Mode.SIGNED


@pytest.mark.parametrize('calibrator', ['max', 'mse', 'grid', 'entropy', 'percentile'])
def test_who_saw_nothing_or_only_zeros_is_left_float_and_returned(calibrator):
    nothing = observing([], calibrator=calibrator)
    empty = observing([torch.zeros(0, 3)], calibrator=calibrator)
    zeros = observing([torch.zeros(9)], calibrator=calibrator)
    something = observing([torch.rand(9)], calibrator=calibrator)
    assert compute_ranges([nothing, something, empty, zeros]) == [nothing, empty, zeros]
    for quantizer in (nothing, empty, zeros):
        x = torch.randn(4)
        assert quantizer.mode is Mode.FLOAT and not quantizer.observing and quantizer(x) is x
    assert something.mode is Mode.UNSIGNED


@pytest.mark.parametrize('value', [1e-40, 1e-30, 1e-10, 1e10, 1e37, 3e38])
@pytest.mark.parametrize('calibrator', ['max', 'mse', 'grid', 'entropy', 'percentile'])
def test_ranges_of_tiny_and_huge_values_are_positive_and_finite(calibrator, value):
    quantizer = observing([torch.rand(200) * value], calibrator=calibrator)
    assert compute_ranges([quantizer]) == []
    assert 0 < quantizer._amax.item() <= value
    assert torch.isfinite(quantizer(torch.rand(50) * value)).all()


@pytest.mark.parametrize('calibrator', ['mse', 'grid'])
@pytest.mark.parametrize('bits', [6, 8, 9, 12])
def test_never_worse_than_the_largest_value_where_a_histogram_is_too_coarse(calibrator, bits):
    """Whole numbers, which bins move to their centres, and steps not much wider than bins."""
    generator = torch.Generator().manual_seed(bits)
    frames = [torch.randint(0, top, (3000,), generator=generator).float() for top in range(100, 300, 4)]
    frames += [torch.randn(3000, generator=generator) * 10**k for k in range(-3, 4)]
    for frame in frames:
        quantizer = observing([frame], bits=bits, calibrator=calibrator)
        compute_ranges([quantizer])
        assert data_error(quantizer, [frame]) <= data_error(quantizer, [frame], float(frame.abs().max()))
