"""torch's own kernel, as it is used on CUDA, against the chain of operations that is used on the CPU."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from q3d_plugin import kernel, numerics

FORMATS = ((2, False), (4, False), (8, False), (8, True), (16, False), (16, True))


def values(channels=16, count=500):
    """(channels, count) with sizes that differ by channel, ties, zeros and what lies outside of the range."""
    x = torch.randn(channels, count) * 10.0 ** torch.linspace(-3, 3, channels)[:, None]
    amax = x.abs().amax(1) * 0.3
    x[:, ::7] = torch.randint(-300, 300, x[:, ::7].shape) * 0.5 * amax[:, None] / 127
    x[:, 0] = 0
    x[3], amax[3] = 0, 0
    return x, amax


@pytest.mark.parametrize(('bits', 'unsigned'), FORMATS)
@pytest.mark.parametrize('axis', [None, 0])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_the_way_of_cuda_gives_the_numbers_of_the_cpu(bits, unsigned, axis, dtype, monkeypatch):
    x, amax = values()
    x, amax = x.to(dtype), amax if axis == 0 else amax.median()
    expected = numerics.fake_quantize(x, amax, bits, unsigned, axis)
    monkeypatch.setattr(kernel, 'is_fast', lambda *_: True)
    found = numerics.fake_quantize(x, amax, bits, unsigned, axis)
    assert found.dtype is dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_the_way_of_cuda_overwrites_its_input_only_where_it_may(inplace, dtype, monkeypatch):
    monkeypatch.setattr(kernel, 'is_fast', lambda *_: True)
    x, amax = values()
    x = x.to(dtype)
    before = x.clone()
    found = numerics.fake_quantize(x, amax.max(), 8, inplace=inplace)
    assert torch.equal(found, numerics.fake_quantize(before, amax.max(), 8))
    assert inplace or torch.equal(x, before)


def test_only_cuda_takes_that_way():
    assert kernel.is_fast('cuda', torch.float32) and kernel.is_fast('cuda', torch.float16)
    # torch 2.1 has no such kernel for it.
    assert not kernel.is_fast('cuda', torch.bfloat16)
    assert not kernel.is_fast('cpu', torch.float32)


@pytest.mark.parametrize(('bits', 'unsigned'), FORMATS)
def test_gradients_of_a_weight_are_those_of_integer_zero_points(bits, unsigned):
    x, amax = values()
    low, high = numerics.bounds(bits, unsigned)
    scale = (amax / high).clamp_min(1e-30)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = numerics.fake_quantize(mine, amax, bits, unsigned, 0)
    zero = torch.zeros(len(scale), dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(other, scale, zero, 0, low, high)
    assert torch.equal(out, expected)
    out.backward(torch.ones_like(out))
    expected.backward(torch.ones_like(out))
    assert torch.equal(mine.grad, other.grad)
    assert 0 < mine.grad.mean() < 1


def test_no_number_of_a_weight_is_read_by_the_host():
    x, amax = values()
    x.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        kernel.fake_quantize(x, amax / 127, 0, -128, 127).sum().backward()
    names = {event.key for event in seen.key_averages()}
    assert 'aten::fake_quantize_per_channel_affine' in names
    assert 'aten::_local_scalar_dense' not in names
