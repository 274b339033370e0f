"""BEVFusion's Quant types against the float types of the double: results, groups with one scale, coverage."""

import copy
import inspect

import bevfusion_double as toy
import pytest
import torch
from mmdet3d.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict
from torch.nn.modules.batchnorm import _BatchNorm

from q3d_plugin import checkpoints, lifecycle
from q3d_plugin.coverage import NORMALIZATION, coverage
from q3d_plugin.layers import QuantAdd, QuantConcat
from q3d_plugin.mmdet3d import parts
from q3d_plugin.mmdet3d.projects import import_bevfusion
from q3d_plugin.mmdet3d.quant_types import put_quant_types
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.sharing import check_sharing, found_groups
from q3d_plugin.zoo.compare import compare, sample
from q3d_plugin.zoo.layers import comparable

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='the double has no compiled operators')

MODELS_OF = {
    'resnet': lambda: toy.fusion_config('resnet'),
    'swin': lambda: toy.fusion_config('swin'),
    'without_points': lambda: toy.fusion_config('resnet', 'LSSTransform'),
    'lidar': toy.lidar_config,
}
PROJECT = [part for part in parts.PARTS if part.project]
HEAD = {'include': ['*bbox_head*']}


@pytest.fixture(scope='module', autouse=True)
def _double():
    with toy.checkout():
        import_bevfusion()
        yield


@pytest.fixture
def make(randomized):
    """Builds a model of :data:`MODELS_OF`: ``make(name, recipe)``; float without a recipe."""

    def build(name, recipe=None):
        cfg = MODELS_OF[name]()
        if recipe is not None:
            put_quant_types(cfg)
        torch.manual_seed(0)
        model = randomized(MODELS.build(cfg)).eval()
        if recipe is not None:
            lifecycle.configure(model, Recipe.from_dict(recipe))
        return model

    return build


def load(model, reference):
    """Loads a float model's weights as the hook does."""
    state = copy.deepcopy(reference.state_dict())
    checkpoints.check_state_dict(model, state)
    load_state_dict(model, state, strict=True)


def calibrated(make, name, recipe):
    model = make(name, recipe)
    load(model, make(name))
    lifecycle.calibrate(model, [toy.frame()], lambda batch: toy.raw_outputs(model, batch))
    return model


def recorded(model, names):
    """What the modules ``names`` return for the frame."""
    seen = {}

    def hook(name):
        return lambda module, args, output: seen.setdefault(name, []).append(sample(output))

    handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in names]
    out = toy.raw_outputs(model, toy.frame())
    for handle in handles:
        handle.remove()
    return {**seen, 'head': [[s for v in out.values() for s in sample(v)]]}


@pytest.mark.parametrize('part', PROJECT, ids=lambda p: p.base)
def test_every_quant_type_takes_the_arguments_of_its_float_type(part):
    base, quant = MODELS.get(part.base), MODELS.get(parts.quant_name(part.base))
    assert issubclass(quant, base)
    for method in ('forward', 'get_cam_feats', 'extract_feat'):
        if hasattr(base, method):
            mine, theirs = (inspect.signature(getattr(c, method)).parameters for c in (quant, base))
            assert list(mine) == list(theirs)


@pytest.mark.parametrize('name', MODELS_OF)
def test_off_is_float_at_every_layer(make, name):
    reference, model = make(name), make(name, {'mode': 'float', **HEAD})
    load(model, reference)
    names = comparable(model)
    expected, got = recorded(reference, names), recorded(model, names)
    assert len(expected) == len(names) + 1
    difference, where = compare(expected, got)
    assert difference < 1e-4, where
    assert not [m for m in model.modules() if isinstance(m, _BatchNorm)]


@pytest.mark.parametrize('channels', [[6, 5], [6, 5, 4], [6, 5, 4, 3]])
@pytest.mark.parametrize('align', [False, True])
def test_the_neck_computes_what_the_float_one_does(randomized, channels, align):
    made = dict(in_channels=channels, out_channels=4, num_outs=len(channels))
    made['upsample_cfg'] = dict(mode='bilinear', align_corners=align)
    reference = randomized(MODELS.build(dict(type='GeneralizedLSSFPN', **made))).eval()
    neck = MODELS.build(dict(type='QuantGeneralizedLSSFPN', **made)).eval()
    lifecycle.configure(neck, Recipe.from_dict({'mode': 'float'}))
    load(neck, reference)
    levels = [torch.randn(2, c, 24 >> i, 20 >> i) for i, c in enumerate(channels)]
    for got, expected in zip(neck(levels), reference(levels)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def shared(model):
    """The names of the units of every quantizer that several have."""
    groups = {}
    for name, unit in lifecycle.units(model):
        if unit.input_quantizer is not None:
            groups.setdefault(id(unit.input_quantizer), set()).add(name)
    return [group for group in groups.values() if len(group) > 1]


DECODER = [
    {'pts_backbone.blocks.1.0', 'pts_neck.deblocks.0.0'},
    {'pts_neck.concat', 'bbox_head.shared_conv'},
]
CAMERAS = [
    {'view_transform.concat', 'view_transform.depthnet.0'},
    {'fusion_layer.concat', 'fusion_layer.0'},
]
NECK = [{f'img_neck.concats.{i}', f'img_neck.lateral_convs.{i}.conv'} for i in (0, 1)]
STUDY = [{f'img_backbone.layer{i + 3}.0.{n}' for n in ('conv1', 'downsample.0')} | NECK[i] for i in (0, 1)]
"""Part B: {layer3[0].conv1, layer3[0].downsample, second concatenation, lateral_convs[0]}, and of layer4."""

SHORTCUTS = [{f'img_backbone.layer{i}.0.{n}' for n in ('conv1', 'downsample.0')} for i in (1, 2)]


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('resnet', DECODER + CAMERAS + STUDY + SHORTCUTS),
        ('swin', DECODER + CAMERAS + NECK),
        ('without_points', DECODER + CAMERAS[1:] + STUDY + SHORTCUTS),
        ('lidar', DECODER),
    ],
)
def test_groups_are_those_of_the_study(make, name, expected):
    model = make(name, HEAD)
    # Residual additions and the branches of the head are tested with their blocks.
    found = [
        {unit for unit in group if not unit.endswith('.add')}
        for group in shared(model)
        if not any('prediction_heads' in unit or '.attn' in unit for unit in group)
    ]
    found = [group for group in found if len(group) > 1]
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))


@pytest.mark.parametrize('name', MODELS_OF)
def test_whoever_reads_a_tensor_of_an_addition_or_concatenation_has_its_scale(make, name):
    model = calibrated(make, name, HEAD)
    named = dict(lifecycle.units(model))
    concatenations = {n for n, unit in named.items() if isinstance(unit, QuantConcat)}
    assert len(concatenations) == {'resnet': 5, 'swin': 5, 'without_points': 4, 'lidar': 1}[name]
    additions = {n for n, unit in named.items() if isinstance(unit, QuantAdd)}
    assert bool(additions)
    for group in found_groups(model, lambda: toy.raw_outputs(model, toy.frame())):
        if (concatenations | additions).intersection(group):
            assert len({id(named[n].input_quantizer) for n in group}) == 1, group
    assert check_sharing(model, lambda: toy.raw_outputs(model, toy.frame())).together == []


def test_residual_blocks_of_the_cameras_follow_the_study(make):
    model = make('resnet', HEAD)
    blocks = [block for i in (1, 2, 3, 4) for block in getattr(model.img_backbone, f'layer{i}')]
    without = [block for block in blocks if block.downsample is None]
    assert without and len(without) < len(blocks)
    for block in blocks:
        first, addition = block.conv1.input_quantizer, block.add.input_quantizer
        if block.downsample is None:
            assert addition is first
        else:
            assert block.downsample[0].input_quantizer is first and addition is not first


@pytest.mark.parametrize('name', MODELS_OF)
def test_every_layer_is_quantized_or_says_why_not(make, name):
    rows = coverage(calibrated(make, name, {}))
    rows = [row for row in rows if row.note != NORMALIZATION]
    head = [row for row in rows if row.name.startswith('bbox_head')]
    assert head and not any(row.quantized for row in head)
    assert all('Q-DETR' in row.note for row in head)
    assert [row for row in rows if not row.quantized and 'float by default' not in row.note] == []


def test_each_part_of_the_head_can_be_switched_on(make):
    parts_of_head = {
        '*bbox_head.shared_conv': 1,
        '*bbox_head.heatmap_head*': 2,
        '*bbox_head.class_encoding': 1,
        '*decoder*attn*': 8,
        '*decoder*ffn*': 2,
        '*decoder*posembed*': 4,
        '*prediction_heads*': 12,
    }
    whole = 0
    for pattern, count in parts_of_head.items():
        rows = coverage(calibrated(make, 'lidar', {'include': [pattern]}))
        assert sum(row.quantized for row in rows if row.name.startswith('bbox_head')) == count, pattern
        whole += count
    assert whole == sum(row.name.startswith('bbox_head') and row.note != NORMALIZATION for row in rows)


@pytest.mark.parametrize('name', ['resnet', 'swin'])
def test_off_is_float_after_smoothing(make, name):
    recipe = {'smoothquant': {'alpha': 0.5}, 'target': 'simulation', 'include': ['*bbox_head*']}
    model = calibrated(make, name, recipe)
    assert sum(row.smoothquant is not None for row in coverage(model)) > 60
    lifecycle.set_enabled(model, False)
    reference = make(name)
    got, expected = (toy.raw_outputs(m, toy.frame()) for m in (model, reference))
    for key, value in expected.items():
        assert (got[key] - value).abs().max() <= 1e-4 * value.abs().max(), key


def test_int8_differs_from_float_but_not_much(make):
    model = calibrated(make, 'resnet', {})
    got = toy.raw_outputs(model, toy.frame())['dense_heatmap']
    expected = toy.raw_outputs(make('resnet'), toy.frame())['dense_heatmap']
    assert 1e-4 < ((got - expected).norm() / expected.norm()).item() < 0.3


def test_gradients_reach_every_weight_of_both_sensors(make):
    model = calibrated(make, 'resnet', {'mode': 'qat'})
    data = model.data_preprocessor(toy.frame(), True)
    metas = [sample.metainfo for sample in data['data_samples']]
    (maps,) = model.extract_feat(data['inputs'], metas)
    maps.square().mean().backward()
    for name, parameter in model.named_parameters():
        # The last level of the image neck has only one reader, which takes the finest one.
        if parameter.requires_grad and not name.startswith('bbox_head'):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_fuser_keeps_the_names_of_its_weights(make):
    model = make('resnet', {})
    keys = {k for k in model.fusion_layer.state_dict() if 'quantizer' not in k}
    assert keys == {'0.weight', '0.bias'}
    assert [name for name, _ in model.fusion_layer.named_children()] == ['concat', '0', '1', '2']
