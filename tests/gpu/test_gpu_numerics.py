"""Fake quantization, histograms and ranges on CUDA against those on the CPU."""

import pytest
import torch
from torch.testing import assert_close

from q3d_plugin import numerics
from q3d_plugin.calibration import MagnitudeHistogram, compute_ranges
from q3d_plugin.quantizer import Quantizer
from q3d_plugin.recipe import CALIBRATORS, WEIGHT_CALIBRATORS, ActivationSpec

FORMATS = ((2, False), (4, False), (8, False), (8, True), (16, False))


def values(channels=32, count=3000):
    """(channels, count) with sizes that differ by channel, values on ties and zeros, and their ranges."""
    x = torch.randn(channels, count) * 10.0 ** torch.linspace(-3, 3, channels)[:, None]
    amax = x.abs().amax(1) * 0.6
    x[:, ::7] = torch.randint(-300, 300, x[:, ::7].shape) * 0.5 * amax[:, None] / 127
    x[3], amax[3] = 0, 0
    return x, amax


@pytest.mark.parametrize(('bits', 'unsigned'), FORMATS)
@pytest.mark.parametrize('axis', [None, 0])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('gradients', [False, True])
def test_fake_quantization_gives_the_bits_of_the_cpu(device, bits, unsigned, axis, dtype, gradients):
    x, amax = values()
    x, amax = x.to(dtype), amax if axis == 0 else amax.median()
    expected = numerics.fake_quantize(x, amax, bits, unsigned, axis)
    there = x.to(device).requires_grad_(gradients)
    found = numerics.fake_quantize(there, amax.to(device), bits, unsigned, axis)
    assert found.dtype is dtype and found.device.type == device.type
    assert torch.equal(found.detach().cpu(), expected)
    if gradients:
        found.backward(torch.ones_like(found))
        low, high = numerics.bounds(bits, unsigned)
        step = (amax / high).clamp_min(1e-30).reshape([-1, 1] if axis == 0 else [])
        level = (x.float() * (1 / step)).round()
        assert torch.equal(there.grad.cpu().float(), ((level >= low) & (level <= high)).float())


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_in_place_gives_the_same_bits(device, dtype):
    x, amax = values()
    x = x.to(dtype)
    expected = numerics.fake_quantize(x, amax.median(), 8)
    found = numerics.fake_quantize(x.to(device), amax.median().to(device), 8, inplace=True)
    assert torch.equal(found.cpu(), expected)


def test_a_range_on_the_other_device_is_moved(device):
    x, amax = values()
    found = numerics.fake_quantize(x.to(device), amax, 8, axis=0)
    assert torch.equal(found.cpu(), numerics.fake_quantize(x, amax, 8, axis=0))


@pytest.mark.parametrize('shape', [(100,), (4, 16, 40, 40), (3_000_000,)])
def test_histograms_count_what_they_count_on_the_cpu(device, shape):
    here, there = MagnitudeHistogram(), MagnitudeHistogram()
    for scale in (1.0, 5.0, 0.3):
        x = torch.randn(shape) * scale
        assert here.update(x) and there.update(x.to(device))
    assert there.counts.device.type == device.type
    assert torch.equal(here.counts, there.counts.cpu())
    assert_close(here.sums, there.sums.cpu(), rtol=1e-9, atol=0)
    for name in ('minimum', 'maximum', 'lowest', 'exponent', 'frames'):
        assert getattr(here, name) == getattr(there, name)
    assert (here.kept is None) == (there.kept is None)
    if here.kept is not None:
        assert torch.equal(here.kept, there.kept.cpu())


def test_histograms_are_the_same_where_algorithms_are_deterministic(device, deterministic):
    here, there = MagnitudeHistogram(), MagnitudeHistogram()
    x = torch.randn(200_000)
    assert here.update(x) and there.update(x.to(device))
    assert torch.equal(here.counts, there.counts.cpu())


def test_values_that_are_not_finite_are_found(device):
    for bad in (float('nan'), float('inf')):
        assert not MagnitudeHistogram().update(torch.tensor([1.0, bad], device=device))


@pytest.mark.parametrize('calibrator', CALIBRATORS)
@pytest.mark.parametrize('bits', [4, 8])
def test_ranges_are_those_of_the_cpu(device, calibrator, bits):
    spec = ActivationSpec(bits=bits, calibrator=calibrator)
    data = [torch.randn(40_000).relu_(), torch.randn(500_000) ** 3]
    found = []
    for where in ('cpu', device):
        members = [Quantizer(spec, name=str(i)).to(where) for i in range(len(data))]
        for quantizer, x in zip(members, data):
            quantizer.observe()
            quantizer(x.to(where))
        assert compute_ranges(members) == []
        found.append((torch.stack([q.amax.cpu() for q in members]), [q.unsigned for q in members]))
    assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize('calibrator', WEIGHT_CALIBRATORS)
@pytest.mark.parametrize('strict', [False, True])
def test_ranges_of_weights_are_those_of_the_cpu(device, calibrator, strict, request):
    if strict:
        request.getfixturevalue('deterministic')
    weight = torch.randn(24, 16, 3, 3)
    expected = numerics.weight_amax(weight, 8, calibrator, percentile=99.0)
    found = numerics.weight_amax(weight.to(device), 8, calibrator, percentile=99.0)
    assert_close(found.cpu(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize('search', ['percentile', 'mse', 'entropy'])
def test_searches_are_those_of_the_cpu_where_algorithms_are_deterministic(device, search, deterministic):
    counts, top = torch.randint(0, 1000, (3, 4096)).double(), torch.tensor([1.0, 4.0, 8.0])
    given = {'percentile': (99.9,), 'mse': (torch.full((3,), 127.0),), 'entropy': (torch.full((3,), 127.0),)}
    function = getattr(numerics, f'search_{search}')
    expected = function(counts, top, top * 0.9, *given[search])
    moved = [v.to(device) if isinstance(v, torch.Tensor) else v for v in given[search]]
    found = function(counts.to(device), top.to(device), (top * 0.9).to(device), *moved)
    assert_close(found.cpu(), expected, rtol=1e-6, atol=0)
