"""Gradients of learned ranges on CUDA against those on the CPU, in full and in half precision."""

import pytest
import torch
from gpu_toys import frames, moved
from torch.testing import assert_close

from q3d_plugin import numerics
from q3d_plugin.layers.model import quantizers
from q3d_plugin.recipe import RangesSpec
from q3d_plugin.training.ranges import (
    check_ranges,
    follow_weights,
    move_ranges,
    range_parameters,
    train_ranges,
)

FORMATS = ((2, False), (4, False), (8, False), (8, True))
LEARNED = [RangesSpec('learned', 'learned', scale) for scale in ('linear', 'log2')]


def gradients(x, amax, axis, bits, unsigned, device, grad):
    """Result and both gradients, on the CPU."""
    given = x.to(device).requires_grad_(), amax.to(device).requires_grad_()
    out = numerics.fake_quantize(*given, bits, unsigned, axis, factor=0.5)
    assert out.dtype is x.dtype
    found = torch.autograd.grad(out, given, grad.to(device))
    return [v.detach().cpu() for v in (out, *found)]


@pytest.mark.parametrize(('bits', 'unsigned'), FORMATS)
@pytest.mark.parametrize('axis', [None, 0, 1])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('layout', ['contiguous_format', 'channels_last'])
def test_gradients_are_those_of_the_cpu(device, bits, unsigned, axis, dtype, layout):
    torch.manual_seed(0)
    x = torch.randn(16, 12, 9, 9).to(dtype).contiguous(memory_format=getattr(torch, layout))
    amax = torch.tensor(1.3) if axis is None else torch.rand(x.shape[axis]) + 0.5
    grad = torch.randn(x.shape).to(dtype)
    expected = gradients(x, amax, axis, bits, unsigned, 'cpu', grad)
    found = gradients(x, amax, axis, bits, unsigned, device, grad)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    # Sums of many numbers in another order.
    assert found[2].dtype is torch.float32
    assert_close(found[2], expected[2], rtol=1e-3, atol=1e-3 * float(grad.float().abs().mean()))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('shape', [(0, 16), (1, 16)])
def test_sparse_features_may_be_few_or_none(device, dtype, shape):
    x, amax = torch.randn(shape).to(dtype), torch.tensor(1.0)
    expected = gradients(x, amax, None, 8, False, 'cpu', torch.ones_like(x))
    for mine, other in zip(gradients(x, amax, None, 8, False, device, torch.ones_like(x)), expected):
        assert_close(mine, other, rtol=1e-3, atol=1e-5)


def trained(device, ranges, dtype=None):
    """Gradients of the ranges of a small net after one pass, by the name of the parameter."""
    model = moved(device)
    train_ranges(model, ranges)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not None):
        heat, score = model(frames(device)[0])
    (heat.float().square().mean() + score.float().square().mean()).backward()
    return model, {n: p.grad.cpu() for n, p in model.named_parameters() if n.endswith('_amax')}


@pytest.mark.parametrize('ranges', LEARNED, ids=['linear', 'log2'])
def test_ranges_of_a_network_get_the_gradients_of_the_cpu(device, ranges):
    (_, expected), (model, found) = trained('cpu', ranges), trained(device, ranges)
    assert set(found) == set(expected) and len(found) == len(range_parameters(model))
    mine, other = (torch.cat([v.reshape(-1) for v in grads.values()]) for grads in (found, expected))
    assert other.norm() > 0
    # A value near a tie may fall to the other side behind convolutions in another order.
    assert (mine - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize('ranges', LEARNED, ids=['linear', 'log2'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_ranges_learn_in_mixed_precision(device, ranges, dtype):
    if device.type == 'cpu' and dtype is torch.float16:
        dtype = torch.bfloat16
    (model, found), (_, full) = trained(device, ranges, dtype), trained(device, ranges)
    assert all(bool(v.isfinite().all()) and v.dtype is torch.float32 for v in found.values())
    mine, other = (torch.cat([v.reshape(-1) for v in grads.values()]) for grads in (found, full))
    assert torch.nn.functional.cosine_similarity(mine, other, dim=0) > 0.8
    check_ranges(model)
    optimizer = torch.optim.Adam(range_parameters(model), lr=1e-2)
    before = [p.detach().clone() for p in range_parameters(model)]
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, range_parameters(model)))


def test_ranges_that_move_or_follow_are_those_of_the_cpu(device):
    for kind in ('fixed', 'moving'):
        found = []
        for where in ('cpu', device):
            model = moved(where)
            train_ranges(model, RangesSpec(kind, kind, 'linear'))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)
                model.train()(frames(where)[0])
            follow_weights(model)
            move_ranges(model, 0.9)
            found.append(torch.cat([q.amax.reshape(-1).cpu() for q in quantizers(model)]))
        assert_close(found[0], found[1], rtol=1e-3, atol=0)
