"""Cameras and LiDAR on CUDA against the CPU: products of activations, shared scales, pooling to a map."""

import pytest
import torch
from gpu_toys import calibrated
from torch import nn
from torch.testing import assert_close

from q3d_plugin import bev_ops, lifecycle
from q3d_plugin.layers import QuantMatMul
from q3d_plugin.layers.matmul import QuantHeadedProduct
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import quantize_


class Attention(nn.Module):
    """Two heads over windows, behind a LayerNorm."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def setup_quant(self):
        self.scores, self.sums = QuantMatMul(), QuantHeadedProduct()

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k))
        return self.proj(self.sums(self.scores(q, k.transpose(-2, -1)).softmax(-1), v))


def windows(device='cpu'):
    return torch.randn(6, 9, 8, generator=torch.Generator().manual_seed(0)).to(device)


def attention(device, **recipe):
    torch.manual_seed(0)
    model = quantize_(Attention()).eval().to(device)
    lifecycle.configure(model, Recipe.from_dict({'include': ['scores', 'sums'], **recipe}))
    lifecycle.calibrate(model, [windows(device)], model)
    return model


@pytest.mark.parametrize('recipe', [{}, {'smoothquant': {'alpha': 0.5}}], ids=['plain', 'smoothed'])
def test_products_of_activations_are_those_of_the_cpu(device, recipe):
    here, there = attention('cpu', **recipe), attention(device, **recipe)
    operands = [there.scores.left, there.scores.right, there.sums.left, there.sums.right]
    assert all(operand.input_quantizer._amax.device.type == device.type for operand in operands)
    with torch.no_grad():
        expected, found = here(windows()), there(windows(device)).cpu()
    assert (expected - found).abs().mean() < 2e-2 * expected.abs().mean()


def test_pooling_to_a_map_is_that_of_the_cpu_forward_and_backward(device):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 4, (60, 4), generator=generator)
    rows[:, 2:] %= 2
    key = ((rows[:, 3] * 2 + rows[:, 2]) * 4 + rows[:, 0]) * 4 + rows[:, 1]
    order = key.argsort(stable=True)
    rows, key = rows[order], key[order]
    lengths = key.unique_consecutive(return_counts=True)[1]
    starts = lengths.cumsum(0) - lengths
    x = torch.randn(60, 5, generator=generator)
    given = rows, lengths, starts
    expected = bev_ops.bev_pool_forward(x, *given, 2, 2, 4, 4)
    moved = [t.to(device) for t in given]
    found = bev_ops.bev_pool_forward(x.to(device), *moved, 2, 2, 4, 4)
    assert_close(found.cpu(), expected)
    gradient = torch.randn(expected.shape, generator=generator)
    assert_close(
        bev_ops.bev_pool_backward(gradient.to(device), *moved, 2, 2, 4, 4).cpu(),
        bev_ops.bev_pool_backward(gradient, *given, 2, 2, 4, 4),
    )


def test_units_that_share_a_scale_share_one_quantizer_on_the_device(device):
    model = calibrated(device)
    groups = ['add', 'body.0'], ['concat', 'down', 'heat', 'box']
    for names in groups:
        quantizers = [model.get_submodule(name).input_quantizer for name in names]
        assert all(quantizer is quantizers[0] for quantizer in quantizers)
        assert quantizers[0]._amax.device.type == device.type
    assert model.add.input_quantizer is not model.concat.input_quantizer
