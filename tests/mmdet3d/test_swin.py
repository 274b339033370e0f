"""mmdet's Swin backbone: quantized layers, products that can be switched on, SmoothQuant into its norms."""

import os
import types
from pathlib import Path

import mmcv
import pytest
import torch
from mmdet3d.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from q3d_plugin import checkpoints, lifecycle
from q3d_plugin.commands import spoil_checkpoint
from q3d_plugin.coverage import coverage
from q3d_plugin.layers import QuantWeightLayer
from q3d_plugin.recipe import Recipe

SHARED = Path(os.environ.get('Q3D_SHARED', Path(__file__).resolve().parents[3] / 'shared'))
IMAGES = sorted((SHARED / 'data' / 'nuscenes_frame').glob('*CAM_FRONT_*.jpg'))

SMALL = dict(embed_dims=16, depths=(2, 2), num_heads=(2, 4), strides=(4, 2), out_indices=(0, 1))
TINY = dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), out_indices=(1, 2, 3))
"""Swin-T, as BEVFusion has it."""

VARIANTS = {
    'plain': {},
    'absolute positions': dict(use_abs_pos_embed=True, pretrain_img_size=(64, 96)),
    'no norm of patches': dict(patch_norm=False),
    'no bias of qkv': dict(qkv_bias=False, qk_scale=0.2),
    'frozen': dict(frozen_stages=1),
    'whole windows': dict(window_size=4),
    'relu': dict(act_cfg=dict(type='ReLU')),
}


def trained_like_(model, seed=0):
    """Random weights with what training gives: scaling by fan-in, biases, norms that differ by channel.

    As mmdet initializes them, branches add almost nothing to the residual stream and all norms are 1.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(like, scale):
        return torch.randn(like.shape, generator=draw) * scale

    with torch.no_grad():
        for module in model.modules():
            bias = getattr(module, 'bias', None)
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight.copy_(normal(module.weight, module.weight[0].numel() ** -0.5))
            elif isinstance(module, nn.LayerNorm):
                module.weight.copy_(normal(module.weight, 0.3).exp())
            if bias is not None:
                bias.copy_(normal(bias, 0.2))
            for name in ('relative_position_bias_table', 'absolute_pos_embed'):
                if hasattr(module, name):
                    getattr(module, name).copy_(normal(getattr(module, name), 0.5))
    return model


def built(kind, size=SMALL, **changes):
    model = MODELS.build(dict(type=kind, **{**size, **changes}))
    model.eval()  # mmdet's returns None
    return model


def pair(size=SMALL, recipe=None, seed=0, state=None, **changes):
    """A float backbone, and the quantized one with its weights, configured."""
    source = trained_like_(built('mmdet.SwinTransformer', size, **changes), seed)
    if state is not None:
        source.load_state_dict(state)
    model = built('QuantSwinTransformer', size, **changes)
    lifecycle.configure(model, Recipe.from_dict({'mode': 'float'} if recipe is None else recipe))
    checkpoints.check_state_dict(model, source.state_dict())
    load_state_dict(model, source.state_dict(), strict=True)
    return source, model


def image(size=(64, 96)):
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))


def real_image():
    """One camera of the real nuScenes frame as BEVFusion reads it, (1, 3, 256, 704)."""
    picture = mmcv.imresize(mmcv.imread(str(IMAGES[0]), channel_order='rgb'), (704, 396))[140:]
    mean, std = (torch.tensor(v) for v in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    return ((torch.from_numpy(picture).float() - mean) / std).permute(2, 0, 1)[None]


def every_output(model, x):
    """Name -> what each module returned, of those that return one tensor."""
    seen, handles = {}, []
    for name, module in model.named_modules():

        def hook(module, args, out, name=name):
            if isinstance(out, torch.Tensor):
                seen[name] = out.clone()

        handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        seen.update({f'out.{i}': level for i, level in enumerate(model(x))})
    for handle in handles:
        handle.remove()
    return seen


def largest_difference(model, source, x, per_layer=True):
    """Largest relative difference of any module's output, or of the outputs alone."""
    expected, got = every_output(source, x), every_output(model, x)
    names = [name for name in expected if per_layer or name.startswith('out.')]
    assert set(expected) <= set(got) and len(names) >= 2
    return max(float((got[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in names)


def l1(model, x, expected):
    """Mean relative L1 error of the levels."""
    with torch.no_grad():
        pairs = list(zip(model(x), expected))
    return sum(float((a - b).abs().sum() / b.abs().sum()) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize('name', VARIANTS)
def test_off_is_float_at_every_layer(name):
    source, model = pair(**VARIANTS[name])
    assert largest_difference(model, source, image()) < 1e-5
    # And so it is in training, after each step of which the frozen stages are set up again.
    source.train(), model.train()
    frozen = [[n for n, p in m.named_parameters() if not p.requires_grad] for m in (source, model)]
    assert frozen[0] == frozen[1] and bool(frozen[0]) == (name == 'frozen')


@pytest.mark.slow
@pytest.mark.skipif(not IMAGES, reason='the real nuScenes frame is not here')
def test_full_size_off_is_float_at_every_layer_on_the_real_image():
    source, model = pair(TINY)
    assert largest_difference(model, source, real_image()) < 1e-4


def test_every_layer_is_quantized_but_the_products():
    _, model = pair(recipe={})
    lifecycle.calibrate(model, [image()], model)
    rows = [r for r in coverage(model) if r.kind != 'LayerNorm']
    blocks = 4
    kinds = {kind: sum(r.kind == kind for r in rows) for kind in {r.kind for r in rows}}
    # qkv, proj and two of the FFN; the reduction between the stages.
    assert kinds == {'Conv2d': 1, 'Linear': 4 * blocks + 1, 'MatMul': 4 * blocks}
    assert all(r.quantized == (r.kind != 'MatMul') for r in rows)
    assert {r.note for r in rows if r.kind == 'MatMul'} == {'float by default: a product of two activations'}


@pytest.mark.parametrize('product', ['query_key', 'attention_value'])
def test_each_product_can_be_switched_on_by_a_pattern(product):
    x = image()
    source, plain = pair(recipe=dict(target='openvino'))
    _, model = pair(recipe=dict(target='openvino', include=[f'*.{product}']))
    for quantized in (plain, model):
        lifecycle.calibrate(quantized, [x], quantized)
    with torch.no_grad():
        expected = source(x)
    assert l1(plain, x, expected) < l1(model, x, expected) < 0.2
    operands = {n: u for n, u in lifecycle.units(model) if not isinstance(u, QuantWeightLayer)}
    on = {n for n, u in operands.items() if u.quantizers()}
    assert len(operands) == 16 and on == {n for n in operands if f'.{product}.' in n}
    if product == 'attention_value':
        # What comes from the softmax lies in [0, 1].
        quantizers = [operands[n].input_quantizer for n in on if n.endswith('left')]
        assert all(q.unsigned and 0 < float(q._amax) <= 1 for q in quantizers)
    lifecycle.set_enabled(model, False)
    assert largest_difference(model, source, x) < 1e-5


def test_recomputed_blocks_have_the_same_gradients():
    gradients = []
    for with_cp in (False, True):
        _, model = pair(recipe=dict(mode='qat', include=['*']), with_cp=with_cp, drop_path_rate=0)
        x = image()
        lifecycle.calibrate(model, [x], model)
        model.train()
        x.requires_grad_()
        sum(level.square().mean() for level in model(x)).backward()
        gradients.append({'image': x.grad, **{n: p.grad for n, p in model.named_parameters()}})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name


def original_names(state):
    """A checkpoint as the authors' repository has it: names that mmdet's ``convert_weights`` understands."""
    new = (
        ('stages.', 'layers.'),
        ('attn.w_msa.', 'attn.'),
        ('ffn.layers.0.0.', 'mlp.fc1.'),
        ('ffn.layers.1.', 'mlp.fc2.'),
        ('patch_embed.projection', 'patch_embed.proj'),
    )
    out = {}
    for name, value in state.items():
        for mine, theirs in new:
            name = name.replace(mine, theirs)
        out[name] = value
    return out


@pytest.mark.parametrize('original', [True, False])
def test_pretrained_weights_are_loaded_as_into_the_float_type(tmp_path, original):
    state = trained_like_(built('mmdet.SwinTransformer'), seed=3).state_dict()
    path = tmp_path / 'swin.pth'
    torch.save(
        {'model': original_names(state) if original else {f'backbone.{k}': v for k, v in state.items()}}, path
    )
    changes = dict(convert_weights=original, init_cfg=ConfigDict(type='Pretrained', checkpoint=str(path)))
    source, model = (built(kind, **changes) for kind in ('mmdet.SwinTransformer', 'QuantSwinTransformer'))
    for backbone in (source, model):
        backbone.init_weights()
    parameters = dict(source.named_parameters())
    assert torch.equal(parameters['stages.1.blocks.0.norm1.weight'], state['stages.1.blocks.0.norm1.weight'])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


def test_without_a_checkpoint_weights_are_initialized_as_in_the_float_type():
    backbones = []
    for kind in ('mmdet.SwinTransformer', 'QuantSwinTransformer'):
        torch.manual_seed(0)
        backbones.append(built(kind, use_abs_pos_embed=True))
        backbones[-1].init_weights()
    parameters = dict(backbones[0].named_parameters())
    for name, parameter in backbones[1].named_parameters():
        assert torch.equal(parameter, parameters[name]), name


# SmoothQuant.


def smoothed(alpha, size=SMALL, x=None, **kwargs):
    """A float backbone, the quantized one after calibration with SmoothQuant, and the image."""
    x = image() if x is None else x
    recipe = dict(smoothquant=None if alpha is None else dict(alpha=alpha))
    source, model = pair(size, recipe, **kwargs)
    lifecycle.calibrate(model, [x], model)
    return source, model, x


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('alpha', [0.5, 1.0, 'search'])
def test_off_is_float_after_smoothing(name, alpha):
    source, model, x = smoothed(alpha, **VARIANTS[name])
    lifecycle.set_enabled(model, False)
    assert largest_difference(model, source, x, per_layer=False) < 1e-5
    assert any(
        not torch.equal(a.weight, b.weight)
        for a, b in zip(model.modules(), source.modules())
        if isinstance(a, nn.LayerNorm) and isinstance(b, nn.LayerNorm)
    )


@pytest.mark.slow
@pytest.mark.skipif(not IMAGES, reason='the real nuScenes frame is not here')
@pytest.mark.parametrize('alpha', [0.5, 1.0, 'search'])
def test_full_size_off_is_float_after_smoothing_on_the_real_image(alpha):
    source, model, x = smoothed(alpha, TINY, real_image())
    lifecycle.set_enabled(model, False)
    assert largest_difference(model, source, x, per_layer=False) < 1e-4


def test_scales_go_into_norms_and_values():
    _, model, _ = smoothed(0.5)
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


def spoilt_state(source, model, x, seed):
    """The state dict of ``source`` with outliers, by the tool, and what it says about the outputs."""
    bench = types.SimpleNamespace(model=model, forward=lambda batch: dict(enumerate(model(batch))))
    graph = spoil_checkpoint.watched_graph(bench, x)
    factors, names = spoil_checkpoint.choose_factors(graph, ['*'], 50, 0.05, seed)
    state = spoil_checkpoint.spoiled(bench, graph, factors, source.state_dict())
    return state, names, spoil_checkpoint.difference(bench, state, x)


def recovered(size, x, seed, alpha):
    """The share of W8A8's loss on a backbone with outlier channels that SmoothQuant gives back."""
    source, model = pair(size, seed=seed)
    state, names, difference = spoilt_state(source, model, x, seed)
    assert difference < 1e-5
    # All but the patch embedding, which reads the image, and the second layer of each FFN.
    layers = [n for n, u in lifecycle.units(model) if isinstance(u, QuantWeightLayer)]
    assert set(layers) - set(names) == {n for n in layers if n.endswith(('projection', 'ffn.layers.1'))}
    with torch.no_grad():
        expected = source(x)
    loss = {}
    for a in (None, alpha):
        _, model, _ = smoothed(a, size, x, seed=seed, state=state)
        loss[a] = l1(model, x, expected)
    return 1 - loss[alpha] / loss[None]


@pytest.mark.parametrize('alpha', [0.5, 'search'])
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_smoothquant_recovers_most_of_what_outliers_cost(seed, alpha):
    assert recovered(SMALL, image(), seed, alpha) > 0.8


@pytest.mark.slow
@pytest.mark.skipif(not IMAGES, reason='the real nuScenes frame is not here')
def test_full_size_smoothquant_recovers_most_of_what_outliers_cost():
    assert recovered(TINY, real_image(), 0, 0.5) > 0.8
