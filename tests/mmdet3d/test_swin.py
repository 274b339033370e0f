"""mmdet's Swin backbone: quantized layers, products that can be switched on, SmoothQuant into its norms."""

import pytest
import torch
from mmdet3d.registry import MODELS
from mmengine.config import ConfigDict
from swin_cases import (
    PICTURES,
    SMALL,
    TINY,
    VARIANTS,
    Swin,
    built,
    calibrate,
    check_frozen,
    check_recomputed,
    image,
    l1,
    largest_difference,
    levels,
    original_names,
    pair,
    real_image,
    recovered,
    smoothed,
    trained_like_,
)
from torch import nn

from q3d_plugin import lifecycle
from q3d_plugin.coverage import coverage
from q3d_plugin.layers import QuantWeightLayer

MMDET = Swin(
    lambda quantized, **settings: MODELS.build(
        dict(type='QuantSwinTransformer' if quantized else 'mmdet.SwinTransformer', **settings)
    ),
    lambda model, x: model(x),
)
real = pytest.mark.skipif(not PICTURES, reason='the real nuScenes frame is not here')
MINE = {**VARIANTS, 'relu': dict(act_cfg=dict(type='ReLU'))}


@pytest.mark.parametrize('name', MINE)
def test_off_is_float_at_every_layer(name):
    source, model = pair(MMDET, {**SMALL, **MINE[name]})
    assert largest_difference(MMDET, model, source, image()) < 1e-5
    check_frozen(source, model, name == 'frozen')


@pytest.mark.slow
@real
def test_full_size_off_is_float_at_every_layer_on_the_real_image():
    source, model = pair(MMDET, TINY)
    assert largest_difference(MMDET, model, source, real_image()) < 1e-4


def test_every_layer_is_quantized_but_the_products():
    _, model = pair(MMDET, SMALL, recipe={})
    calibrate(MMDET, model, image())
    rows = [r for r in coverage(model) if r.kind != 'LayerNorm']
    kinds = {kind: sum(r.kind == kind for r in rows) for kind in {r.kind for r in rows}}
    # Of each of four blocks qkv, proj and two of the FFN; the reduction between the stages; two products.
    assert kinds == {'Conv2d': 1, 'Linear': 4 * 4 + 1, 'MatMul': 4 * 4}
    assert all(r.quantized == (r.kind != 'MatMul') for r in rows)
    assert {r.note for r in rows if r.kind == 'MatMul'} == {'float by default: a product of two activations'}


@pytest.mark.parametrize('product', ['query_key', 'attention_value'])
def test_each_product_can_be_switched_on_by_a_pattern(product):
    x = image()
    source, plain = pair(MMDET, SMALL, dict(target='openvino'))
    _, model = pair(MMDET, SMALL, dict(target='openvino', include=[f'*.{product}']))
    for quantized in (plain, model):
        calibrate(MMDET, quantized, x)
    expected = levels(MMDET, source, x)
    # Beside the other layers' errors that of the products is small, and may even undo some of them.
    without, with_product = (l1(MMDET, quantized, x, expected) for quantized in (plain, model))
    assert without != with_product and without / 2 < with_product < 0.2
    operands = {n: u for n, u in lifecycle.units(model) if not isinstance(u, QuantWeightLayer)}
    on = {n for n, u in operands.items() if u.quantizers()}
    assert len(operands) == 16 and on == {n for n in operands if f'.{product}.' in n}
    if product == 'attention_value':
        # What comes from the softmax lies in [0, 1].
        quantizers = [operands[n].input_quantizer for n in on if n.endswith('left')]
        assert all(q.unsigned and 0 < float(q._amax) <= 1 for q in quantizers)
    lifecycle.set_enabled(model, False)
    assert largest_difference(MMDET, model, source, x) < 1e-5


def test_recomputed_blocks_have_the_same_gradients():
    check_recomputed(MMDET)


@pytest.mark.parametrize('original', [True, False])
def test_pretrained_weights_are_loaded_as_into_the_float_type(tmp_path, original):
    state = trained_like_(built(MMDET, False, SMALL), seed=3).state_dict()
    path = tmp_path / 'swin.pth'
    named = original_names(state) if original else {f'backbone.{k}': v for k, v in state.items()}
    torch.save({'model': named}, path)
    init = ConfigDict(type='Pretrained', checkpoint=str(path))
    settings = dict(SMALL, convert_weights=original, init_cfg=init)
    source, model = (built(MMDET, quantized, settings) for quantized in (False, True))
    for backbone in (source, model):
        backbone.init_weights()
    parameters = dict(source.named_parameters())
    assert torch.equal(parameters['stages.1.blocks.0.norm1.weight'], state['stages.1.blocks.0.norm1.weight'])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


def test_without_a_checkpoint_weights_are_initialized_as_in_the_float_type():
    backbones = []
    for quantized in (False, True):
        torch.manual_seed(0)
        backbones.append(built(MMDET, quantized, dict(SMALL, use_abs_pos_embed=True)))
        backbones[-1].init_weights()
    parameters = dict(backbones[0].named_parameters())
    for name, parameter in backbones[1].named_parameters():
        assert torch.equal(parameter, parameters[name]), name


# SmoothQuant.


@pytest.mark.parametrize('name', MINE)
@pytest.mark.parametrize('alpha', [0.5, 1.0, 'search'])
def test_off_is_float_after_smoothing(name, alpha):
    source, model = smoothed(MMDET, alpha, {**SMALL, **MINE[name]}, image())
    lifecycle.set_enabled(model, False)
    assert largest_difference(MMDET, model, source, image(), per_layer=False) < 1e-5
    norms = [[m.weight for m in net.modules() if isinstance(m, nn.LayerNorm)] for net in (source, model)]
    assert any(not torch.equal(a, b) for a, b in zip(*norms))


@pytest.mark.slow
@real
@pytest.mark.parametrize('alpha', [0.5, 1.0, 'search'])
def test_full_size_off_is_float_after_smoothing_on_the_real_image(alpha):
    source, model = smoothed(MMDET, alpha, TINY, real_image())
    lifecycle.set_enabled(model, False)
    assert largest_difference(MMDET, model, source, real_image(), per_layer=False) < 1e-4


def test_scales_go_into_norms_and_values():
    _, model = smoothed(MMDET, 0.5, SMALL, image())
    rows = {r.name: r for r in coverage(model) if r.smoothquant}
    # The image, and what follows GELU, have no producer; everything else costs nothing at run time.
    explicit = {n for n, r in rows.items() if r.smoothquant['explicit']}
    assert explicit == {'patch_embed.projection'} | {n for n in rows if n.endswith('ffn.layers.1')}
    for stage, block in ((s, b) for s in (0, 1) for b in (0, 1)):
        name = f'stages.{stage}.blocks.{block}'
        for layer, maker in (
            ('attn.w_msa.qkv', 'norm1'),
            ('attn.w_msa.proj', 'attn.w_msa.qkv'),
            ('ffn.layers.0.0', 'norm2'),
        ):
            assert rows[f'{name}.{layer}'].smoothquant['producers'] == [f'{name}.{maker}']
    assert rows['stages.0.downsample.reduction'].smoothquant['producers'] == ['stages.0.downsample.norm']


@pytest.mark.parametrize('alpha', [0.5, 'search'])
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_smoothquant_recovers_most_of_what_outliers_cost(seed, alpha):
    assert recovered(MMDET, SMALL, image(), seed, alpha) > 0.8


@pytest.mark.slow
@real
def test_full_size_smoothquant_recovers_most_of_what_outliers_cost():
    assert recovered(MMDET, TINY, real_image(), 0, 0.5) > 0.8
