"""Gradients of fake quantization, for its input and for its range, against slow references."""

import math

import pytest
import torch
from torch.testing import assert_close

from q3d_plugin import numerics, straight_through
from q3d_plugin.straight_through import fake_quantize, gradient_scale

FORMATS = ((2, False), (4, False), (8, False), (4, True), (8, True), (16, False))


def reference(x, step, axis, low, high):
    """Fake quantization out of differentiable operations, in float64.

    Rounding passes gradients as they are, and clamp's gradient at a bound is counted by its integer.
    """
    if axis is not None:
        shape = [1] * x.dim()
        shape[axis] = -1
        step = step.reshape(shape)
    scaled = x / step
    level = scaled + (scaled.round() - scaled).detach()
    inside = (level.detach() >= low) & (level.detach() <= high)
    return torch.where(inside, level, level.detach().clamp(low, high)) * step


def tensor_of(shape, layout, dtype):
    """Values of which some lie outside of a range of 1.5, none at a bound between two integers."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    if layout == 'transposed':
        x = x.transpose(0, -1)
    elif layout == 'strided':
        x = x.repeat_interleave(2, -1)[..., ::2]
    elif layout != 'plain':
        x = x.contiguous(memory_format=getattr(torch, layout))
    return x.to(dtype)


LAYOUTS = (
    ((2, 6, 5, 7), 'plain'),
    ((2, 6, 5, 7), 'channels_last'),
    ((2, 6, 5, 7), 'transposed'),
    ((2, 6, 5, 7), 'strided'),
    ((40, 6), 'plain'),
    ((40, 6), 'transposed'),
    ((4, 3, 3, 3, 5), 'plain'),
    ((4, 3, 3, 3, 5), 'channels_last_3d'),
    ((9,), 'plain'),
    ((0, 6), 'plain'),
)


@pytest.mark.parametrize(('bits', 'unsigned'), FORMATS)
@pytest.mark.parametrize(('shape', 'layout'), LAYOUTS)
@pytest.mark.parametrize('axis', [None, 0, 1])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('piece', [64, 0])
def test_gradients_are_those_of_autograd(bits, unsigned, shape, layout, axis, dtype, piece, monkeypatch):
    if piece:
        monkeypatch.setattr(straight_through, 'PIECE', piece)
    else:
        # As a whole, which is the way of CUDA.
        monkeypatch.setattr(straight_through, '_in_pieces', lambda x, axis: False)
    x = tensor_of(shape, layout, dtype).requires_grad_()
    axis = 0 if axis is not None and x.dim() == 1 else axis
    low, high = numerics.bounds(bits, unsigned)
    count = () if axis is None else (x.shape[axis],)
    # Steps and their inverses are float32: these are exact.
    step = torch.full(count, 2.0 ** math.floor(math.log2(1.5 / high))) * (1 + torch.rand(count).round())
    amax = (step.double() * high).requires_grad_()
    weight = torch.randn(x.shape, dtype=dtype)

    out = fake_quantize(x, amax, step, axis, low, high)
    found = torch.autograd.grad(out, (x, amax), weight)
    wide, steps = x.detach().double().requires_grad_(), step.double().requires_grad_()
    slow = reference(wide, steps, axis, low, high)
    of_x, of_step = torch.autograd.grad(slow, (wide, steps), weight.double())

    assert out.dtype is dtype and out.shape == x.shape
    assert found[0].dtype is dtype and found[1].dtype is torch.float64
    tolerance = 1e-12 if dtype is torch.float64 else 2e-5
    if dtype is torch.float64:
        assert_close(found[0], of_x, rtol=1e-12, atol=0)
        assert_close(out.detach(), slow.detach(), rtol=1e-12, atol=1e-12)
    else:
        # A float32 may be rounded to the other side of a half.
        assert ((found[0].double() - of_x).abs() > 1e-6).sum() <= 1e-3 * x.numel()
    scale = float(weight.abs().sum()) * high if x.numel() else 1.0
    assert_close(found[1], of_step / high, rtol=0, atol=tolerance * scale / high)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('axis', [None, 0])
@pytest.mark.parametrize('unsigned', [False, True])
def test_half_precision_is_computed_in_float32(dtype, axis, unsigned):
    x = tensor_of((8, 300), 'plain', dtype)
    amax = torch.full((8,) if axis == 0 else (), 1.5)
    grad = torch.randn(8, 300).to(dtype)
    found = []
    for source, upper in ((x, grad), (x.float(), grad.float())):
        given = source.clone().requires_grad_(), amax.clone().requires_grad_()
        out = numerics.fake_quantize(*given, 8, unsigned, axis)
        found.append((out.detach(), *torch.autograd.grad(out, given, upper)))
    assert found[0][0].dtype is found[0][1].dtype is dtype and found[0][2].dtype is torch.float32
    assert torch.equal(found[0][0], found[1][0].to(dtype))
    assert torch.equal(found[0][1], found[1][1].to(dtype))
    assert_close(found[0][2], found[1][2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(('bits', 'unsigned'), FORMATS)
@pytest.mark.parametrize('axis', [None, 0])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16])
def test_nothing_passes_outside_of_the_range(bits, unsigned, axis, dtype):
    low, high = numerics.bounds(bits, unsigned)
    # Multiples of half a step, which is one: every bound, its tie, and what lies beyond.
    reach = min(high + 3, 300)
    near = torch.arange(-2 * reach, 2 * reach + 1, dtype=torch.float64) / 2
    x = torch.cat([near, near + low, near + high]).to(dtype)[None].requires_grad_()
    amax = torch.tensor([float(high)] if axis == 0 else float(high))
    numerics.fake_quantize(x, amax, bits, unsigned, axis).sum().backward()
    level = x.detach().double().round()
    assert torch.equal(x.grad, ((level >= low) & (level <= high)).to(dtype))
    assert 0 < x.grad.double().mean() < 1


@pytest.mark.parametrize('axis', [None, 0])
def test_the_gradient_of_a_step_is_equation_3_of_lsq(axis):
    low, high, step = -8, 7, 0.5
    for value, expected in ((0.6, 1 - 1.2), (-0.9, -2 + 1.8), (9.0, high), (-9.0, low), (0.0, 0.0)):
        x = torch.tensor([value], dtype=torch.float64)
        amax = torch.full((1,) if axis == 0 else (), step * high, dtype=torch.float64, requires_grad=True)
        out = fake_quantize(x, amax, amax.detach().float() / high, axis, low, high, factor=3.0)
        out.backward(torch.tensor([2.0], dtype=torch.float64))
        # That of the range, which is the step times the largest integer.
        assert float(amax.grad) == pytest.approx(2 * 3 * expected / high)


@pytest.mark.parametrize(('bits', 'unsigned'), [f for f in FORMATS if f[0] <= 8])
@pytest.mark.parametrize('axis', [None, 0, 1])
def test_gradients_are_those_of_torchs_own_learnable_quantization(bits, unsigned, axis):
    low, high = numerics.bounds(bits, unsigned)
    x = tensor_of((16, 12, 3, 3), 'plain', torch.float32)
    step = torch.full((1 if axis is None else x.shape[axis],), 1.5 / high)
    zero, grad = torch.zeros_like(step), torch.randn_like(x)
    peers = x.clone().requires_grad_(), step.clone().requires_grad_()
    if axis is None:
        peer = torch._fake_quantize_learnable_per_tensor_affine(*peers, zero, low, high, 0.25)
    else:
        peer = torch._fake_quantize_learnable_per_channel_affine(*peers, zero, axis, low, high, 0.25)
    mine = x.clone().requires_grad_(), (step * high).reshape(() if axis is None else -1).requires_grad_()
    scale = step.reshape(mine[1].shape)
    out = fake_quantize(*mine, scale, axis, low, high, factor=0.25)
    expected = torch.autograd.grad(peer, peers, grad)
    found = torch.autograd.grad(out, mine, grad)
    assert_close(out, peer, rtol=1e-6, atol=0)
    assert torch.equal(found[0], expected[0])
    assert_close(found[1].reshape(-1) * high, expected[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('axis', [None, 0])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_values_are_those_without_gradients_bit_for_bit(axis, dtype):
    x = tensor_of((8, 30_000), 'plain', dtype)
    amax = torch.rand(8) + 0.5 if axis == 0 else torch.tensor(1.3)
    expected = numerics.fake_quantize(x, amax, 8, False, axis)
    for learned in (False, True):
        given = x.clone().requires_grad_(), amax.clone().requires_grad_(learned)
        assert torch.equal(numerics.fake_quantize(*given, 8, False, axis), expected)


def test_the_factor_is_that_of_lsq_for_one_channel_and_one_sample():
    weight, map_, voxels = torch.zeros(8, 4, 3, 3), torch.zeros(2, 16, 5, 5), torch.zeros(1000, 32)
    assert gradient_scale(weight, 127, 0) == pytest.approx((4 * 9 * 127) ** -0.5)
    assert gradient_scale(weight.transpose(0, 1), 127, 1) == pytest.approx((4 * 9 * 127) ** -0.5)
    assert gradient_scale(map_, 255, None) == pytest.approx((16 * 25 * 255) ** -0.5)
    assert gradient_scale(map_[:1], 255, None) == gradient_scale(map_, 255, None)
    assert gradient_scale(voxels, 7, None) == pytest.approx((32 * 7) ** -0.5)
    assert gradient_scale(torch.zeros(()), 7, None) == gradient_scale(torch.zeros(0, 1), 7, None) == 7**-0.5


@pytest.mark.parametrize('learned', [False, True])
def test_a_gradient_that_lies_otherwise_in_memory_meets_its_own_elements(learned):
    x = tensor_of((2, 6, 5, 7), 'channels_last', torch.float32).requires_grad_()
    amax = torch.tensor(1.5, requires_grad=learned)
    grad = torch.randn(2, 6, 5, 7)
    for upper in (grad, grad.contiguous(memory_format=torch.channels_last), grad[:1, :1].expand(2, 6, 5, 7)):
        x.grad = None
        numerics.fake_quantize(x, amax, 4).backward(upper)
        inside = (x.detach() / (1.5 / 7)).round().clamp(-8, 7) == (x.detach() / (1.5 / 7)).round()
        assert torch.equal(x.grad, upper * inside)


def test_what_is_not_wanted_is_not_computed():
    x, amax = torch.randn(4, 5), torch.tensor(1.0, requires_grad=True)
    numerics.fake_quantize(x, amax, 8).sum().backward()
    assert amax.grad is not None and x.grad is None
    with torch.no_grad():
        assert not numerics.fake_quantize(x, amax, 8).requires_grad


def test_an_input_is_kept_as_it_is_and_no_copy_of_it():
    x = torch.randn(64, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        numerics.fake_quantize(x, torch.tensor(1.0), 8)
    assert x.data_ptr() in saved and len(saved) == 2
