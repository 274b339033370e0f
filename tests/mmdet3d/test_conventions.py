"""mmcv's modules as the core sees them: what is folded in a ConvModule, and which types are known."""

import copy

import pytest
import torch
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks import wrappers
from mmcv.ops import sparse_modules
from torch import nn

import q3d_plugin.mmdet3d  # noqa: F401  (hands the conventions in)
from q3d_plugin.layers import why_not
from q3d_plugin.layers.conventions import is_activation, is_sequence
from q3d_plugin.lifecycle import set_enabled
from q3d_plugin.mmdet3d.parts import BLOCKS
from q3d_plugin.transforms.fold import find_pairs
from q3d_plugin.transforms.insert import quantize_

ORDERS = {
    ('conv', 'norm', 'act'): [('conv', 'bn')],
    ('act', 'conv', 'norm'): [('conv', 'bn')],
    ('norm', 'conv', 'act'): [],
    ('conv', 'act', 'norm'): [],
    ('norm', 'act', 'conv'): [],
}


@pytest.mark.parametrize('order', ORDERS)
def test_a_conv_module_is_folded_where_its_order_says_that_the_norm_comes_next(order, randomized):
    torch.manual_seed(0)
    model = randomized(nn.Sequential(ConvModule(4, 4, 3, norm_cfg=dict(type='BN'), order=order))).eval()
    assert find_pairs(model[0]) == ORDERS[order]
    quant = quantize_(copy.deepcopy(model), BLOCKS)
    set_enabled(quant, False)
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(quant(x), model(x), rtol=1e-4, atol=1e-5)
    loaded = quantize_(nn.Sequential(ConvModule(4, 4, 3, norm_cfg=dict(type='BN'), order=order))).eval()
    result = loaded.load_state_dict(model.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    set_enabled(loaded, False)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_conv_module_without_a_norm_has_no_pair():
    assert (
        find_pairs(ConvModule(4, 4, 1))
        == []
        == find_pairs(ConvModule(4, 4, 1, norm_cfg=dict(type='GN', num_groups=2)))
    )


@pytest.mark.parametrize('name', ['Conv2d', 'Conv3d', 'ConvTranspose2d', 'ConvTranspose3d', 'Linear'])
def test_wrappers_stand_for_their_layers(name):
    assert why_not(getattr(wrappers, name)(3, 4, *([] if name == 'Linear' else [1]))) == ''


def test_sequences_and_activations_are_known():
    assert is_sequence(sparse_modules.SparseSequential()) and not is_sequence(nn.ModuleList())
    assert is_activation(torch.nn.ReLU()) and not is_activation(ConvModule(4, 4, 1))
    from mmcv.cnn.bricks.activation import Clamp

    assert is_activation(Clamp())
