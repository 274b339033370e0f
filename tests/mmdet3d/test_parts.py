"""The registered Quant types against the float types of MMDetection3D."""

import copy
import inspect
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.models.backbones import resnet, resnext
from mmdet3d.models.backbones import dla
from mmdet3d.models.layers.norm import NaiveSyncBatchNorm1d, NaiveSyncBatchNorm2d
from mmdet3d.models.necks.imvoxel_neck import ResModule
from mmdet3d.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from q3d_plugin import checkpoints, lifecycle
from q3d_plugin.coverage import coverage
from q3d_plugin.layers import QuantAdd
from q3d_plugin.mmdet3d import parts
from q3d_plugin.mmdet3d.parts import BLOCKS, PARTS, quant_name
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import quantize_
from q3d_plugin.transforms.sharing import SharedScale, check_sharing

SHARED = Path(os.environ.get('Q3D_SHARED', Path(__file__).resolve().parents[3] / 'shared'))
FRAME = sorted((SHARED / 'data' / 'nuscenes_frame').glob('*LIDAR_TOP*.pcd.bin'))
TOY = ('toy_centerpoint_voxel.py', 'toy_centerpoint_voxel_w8a8.py')
FULL_BASE = 'centerpoint_voxel0075_second_secfpn_nus_w8a8.py'
FLOAT_TYPES = {
    'pts_middle_encoder.type': 'SparseEncoder',
    'pts_backbone.type': 'SECOND',
    'pts_neck.type': 'SECONDFPN',
    'pts_bbox_head.type': 'CenterHead',
}


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def load(model, reference):
    checkpoints.check_state_dict(model, reference.state_dict())
    load_state_dict(model, reference.state_dict(), strict=True)


@pytest.mark.parametrize('part', [p for p in PARTS if not p.project], ids=lambda p: p.base)
def test_every_quant_type_takes_the_arguments_of_its_float_type(part):
    base, quant = MODELS.get(part.base), MODELS.get(quant_name(part.base))
    assert issubclass(quant, base)
    if part.mixin is not None and 'forward' in vars(part.mixin):
        mine = inspect.signature(part.mixin.forward).parameters
        assert list(mine) == list(inspect.signature(base.forward).parameters)


def test_blocks_derive_from_what_they_replace():
    for base, quant in BLOCKS.items():
        assert issubclass(quant, base)


def test_quantized_detectors_and_blocks_travel_between_processes(build_model):
    for cls in BLOCKS.values():
        assert pickle.loads(pickle.dumps(cls)) is cls
    model = build_model(TOY[1])
    again = pickle.loads(pickle.dumps(model))
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    assert again.state_dict().keys() == model.state_dict().keys()


def quantized_copy(module):
    """A float module quantized, with all quantizers off."""
    model = quantize_(copy.deepcopy(module), BLOCKS)
    lifecycle.set_enabled(model, False)
    return model


BASIC = {'inplanes': 8, 'planes': 8}
SHORTCUT = {
    'downsample': nn.Sequential(nn.Conv2d(8, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8)),
    'stride': 2,
}
POOLED = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
RESIDUAL_BLOCKS = {
    'basic': lambda: resnet.BasicBlock(**BASIC),
    'basic_shortcut': lambda: resnet.BasicBlock(**BASIC, **SHORTCUT),
    'bottleneck': lambda: resnet.Bottleneck(8, 2),
    'bottleneck_pooled_shortcut': lambda: resnet.Bottleneck(8, 2, stride=2, downsample=POOLED),
    'resnext': lambda: resnext.Bottleneck(8, 2, groups=2, base_width=4, base_channels=2),
    'dla': lambda: dla.BasicBlock(8, 8, {'type': 'BN'}, {'type': 'Conv'}),
    'imvoxel': lambda: ResModule(8, 8),
    'imvoxel_strided': lambda: ResModule(8, 8, stride=2),
}


@pytest.mark.parametrize('name', RESIDUAL_BLOCKS)
def test_residual_blocks_off_are_float(name, randomized):
    torch.manual_seed(0)
    block = randomized(nn.Sequential(RESIDUAL_BLOCKS[name]())).eval()
    quant = quantized_copy(block)
    assert type(quant[0]) is not type(block[0]) and isinstance(quant[0].add, QuantAdd)
    x = torch.randn((2, 8, 6, 6, 6) if 'imvoxel' in name else (2, 8, 6, 6))
    torch.testing.assert_close(quant(x), block(x), rtol=1e-4, atol=1e-5)
    # The two layers that read the block's input share its quantizer; behind a pooling it is another tensor.
    shortcut = [m for n, m in quant[0].named_modules() if n.startswith('downsample') and hasattr(m, 'weight')]
    first = getattr(quant[0], 'conv1' if 'imvoxel' not in name else 'conv0')
    reads = [m for m in first.modules() if hasattr(m, 'weight')][0].input_quantizer
    assert all((m.input_quantizer is reads) == ('pooled' not in name) for m in shortcut)


@pytest.mark.parametrize('name', RESIDUAL_BLOCKS)
def test_what_the_relu_behind_a_residual_block_removes_does_not_widen_the_range(name):
    torch.manual_seed(0)
    block = nn.Sequential(RESIDUAL_BLOCKS[name]()).eval()
    last = [m for n, m in block.named_modules() if 'downsample' not in n and hasattr(m, 'running_mean')][-1]
    with torch.no_grad():
        last.bias[0] = -100
    quant = quantize_(copy.deepcopy(block), BLOCKS)
    x = torch.randn((2, 8, 6, 6, 6) if 'imvoxel' in name else (2, 8, 6, 6)).relu()
    lifecycle.calibrate(quant, [x], quant)
    assert block(x)[:, 0].max() == 0
    assert quant[0].add.input_quantizer._amax.item() < 20


def test_a_block_that_recomputes_its_forward_has_the_same_gradients(randomized):
    torch.manual_seed(0)
    block = randomized(nn.Sequential(resnet.Bottleneck(8, 2))).eval()
    gradients = []
    for with_cp in (False, True):
        quant = quantized_copy(block)
        quant[0].with_cp = with_cp
        x = torch.ones(1, 8, 5, 5, requires_grad=True)
        quant(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in quant.parameters())])
    for plain, recomputed in zip(*gradients):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize(
    ('norm', 'layer', 'shape'),
    [
        (NaiveSyncBatchNorm2d, nn.Conv2d(3, 4, 3, bias=False), (2, 3, 8, 8)),
        (NaiveSyncBatchNorm1d, nn.Conv1d(3, 4, 1), (2, 3, 8)),
    ],
)
def test_naive_sync_batch_norm_is_folded(norm, layer, shape, randomized):
    model = randomized(nn.Sequential(layer, norm(4))).eval()
    quant = quantized_copy(model)
    assert isinstance(quant[1], nn.Identity) and quant[0].bias is not None
    x = torch.randn(shape)
    torch.testing.assert_close(quant(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_detector_quantizes_only_the_children_that_have_no_type_of_their_own():
    part = next(p for p in PARTS if p.children)
    base = type('Base', (nn.Module,), {})

    def __init__(self):
        nn.Module.__init__(self)
        self.img_mlp, self.backbone = nn.Sequential(nn.Conv1d(2, 2, 1)), nn.Sequential(nn.Conv1d(2, 2, 1))

    base.__init__ = __init__
    made = parts._quant_type(part, base)()
    assert [name for name, _ in lifecycle.units(made)] == ['img_mlp.0']


def test_toy_off_is_float(build_model, points, raw_outputs):
    reference, model = (build_model(c) for c in TOY)
    lifecycle.configure(model, Recipe.from_dict({'target': 'simulation', 'mode': 'float'}))
    load(model, reference)
    expected, got = raw_outputs(reference, points), raw_outputs(model, points)
    assert expected.keys() == got.keys() and len(got) == 36
    for name in expected:
        assert relative_error(got[name], expected[name]) < 1e-4, name


@pytest.mark.skipif(not FRAME, reason='the real nuScenes frame is not here')
def test_full_size_off_is_float_on_the_real_frame(build_model, raw_outputs):
    points = torch.from_numpy(np.fromfile(FRAME[0], np.float32).reshape(-1, 5))
    reference = build_model(FULL_BASE, **FLOAT_TYPES)
    assert not lifecycle.units(reference)
    model = build_model(FULL_BASE)
    lifecycle.configure(model, Recipe.from_dict({'target': 'simulation', 'mode': 'float'}))
    load(model, reference)
    expected, got = raw_outputs(reference, points), raw_outputs(model, points)
    for name in expected:
        assert relative_error(got[name], expected[name]) < 1e-4, name


def smoothed(raw_outputs, reference, model, points, alpha, mode):
    """Smooths ``model`` and switches it off: relative error of its outputs against the float model's."""
    lifecycle.configure(
        model, Recipe.from_dict(dict(target='simulation', smoothquant=dict(alpha=alpha, mode=mode)))
    )
    load(model, reference)
    lifecycle.calibrate(model, [points], lambda frame: raw_outputs(model, frame))
    lifecycle.set_enabled(model, False)
    expected, got = raw_outputs(reference, points), raw_outputs(model, points)
    return max(relative_error(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize('mode', ['static', 'dynamic'])
def test_toy_off_is_float_after_smoothing(build_model, points, raw_outputs, mode):
    reference, model = (build_model(c) for c in TOY)
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        assert smoothed(raw_outputs, reference, model, points, alpha, mode) < 1e-4
        rows = [r for r in coverage(model) if r.smoothquant]
        assert len(rows) == 108
        if mode == 'static':
            # All but the first layer, which reads the points, have their scales in the layers before them:
            # through residual blocks, the dense map of the voxels, the concatenation of the neck.
            assert [r.name for r in rows if r.smoothquant['explicit']] == ['pts_middle_encoder.conv_input.0']


@pytest.mark.slow
@pytest.mark.skipif(not FRAME, reason='the real nuScenes frame is not here')
@pytest.mark.parametrize('alpha, mode', [(0.5, 'static'), (1.0, 'dynamic')])
def test_full_size_off_is_float_after_smoothing(build_model, raw_outputs, alpha, mode):
    points = torch.from_numpy(np.fromfile(FRAME[0], np.float32).reshape(-1, 5))
    reference, model = build_model(FULL_BASE, **FLOAT_TYPES), build_model(FULL_BASE)
    assert smoothed(raw_outputs, reference, model, points, alpha, mode) < 1e-4


def test_int8_differs_from_float_but_not_much(build_model, points, raw_outputs):
    reference, model = (build_model(c) for c in TOY)
    lifecycle.configure(model, Recipe.from_dict({'target': 'simulation'}))
    load(model, reference)
    lifecycle.calibrate(model, [points], lambda frame: raw_outputs(model, frame))
    expected, got = raw_outputs(reference, points), raw_outputs(model, points)
    errors = [((got[k] - v).norm() / v.norm()).item() for k, v in expected.items()]
    assert 1e-3 < max(errors) < 0.3


def test_every_convolution_of_the_toy_is_quantized(build_model, points, raw_outputs):
    model = build_model(TOY[1])
    lifecycle.configure(model, Recipe.from_dict({'target': 'simulation'}))
    lifecycle.calibrate(model, [points], lambda frame: raw_outputs(model, frame))
    rows = coverage(model)
    assert [r.name for r in rows if not r.quantized] == []
    kinds = {kind: sum(r.kind == kind for r in rows) for kind in {r.kind for r in rows}}
    # 8 residual blocks of two, conv_input; 12 + 1 + 1 + 72 dense ones; three strided ones and conv_out.
    assert kinds == {
        'SubMConv3d': 17,
        'SparseConv3d': 4,
        'Conv2d': 12 + 1 + 1 + 72,
        'ConvTranspose2d': 1,
        'Add': 8,
        'Concat': 1,
    }
    # Behind a ReLU the range is unsigned; the voxel means have both signs, and so has the branch of a
    # residual block, with which the block's input shares its scale.
    signed = {r.name for r in rows if r.activation.startswith('int8')}
    blocks = {r.name for r in rows if r.kind == 'Add'} | {
        r.name for r in rows if r.name[-8:] in ('.0.conv1', '.1.conv1')
    }
    assert signed == blocks | {'pts_middle_encoder.conv_input.0'}


def test_first_layers_of_all_branches_share_one_quantizer(build_model):
    model = build_model(TOY[1])
    lifecycle.configure(model, Recipe.from_dict({'target': 'simulation'}))
    heads = model.pts_bbox_head.task_heads
    first = {getattr(h, b)[0].conv.input_quantizer for h in heads for b in h.heads}
    assert len(first) == 1 and len(first.pop().owners) == 36


def test_what_reads_one_tensor_is_declared(build_model, points, raw_outputs):
    model = build_model(TOY[1])
    lifecycle.configure(model, Recipe.from_dict({'mode': 'float'}))
    found = check_sharing(model, lambda: raw_outputs(model, points))
    assert found.together == []
    quantizer = {n: u.input_quantizer for n, u in lifecycle.units(model)}
    apart = [names for names in found.scales if len({id(quantizer[name]) for name in names}) > 1]
    # Backbone, neck and head are parts of their own, and only the detector, which has no Quant type, holds
    # them: these share from calibration on.
    across = [
        ['pts_backbone.blocks.1.0', 'pts_neck.deblocks.0.0'],
        ['pts_neck.concat', 'pts_bbox_head.shared_conv.conv'],
    ]
    assert apart == across


def test_a_part_may_declare_scales_that_its_modules_share():
    """A line of the table: a detector whose backbone and neck have one scale."""
    scale = SharedScale('levels', ('backbone.1', 'img_mlp.0'))
    part = parts.Part('ImVoteNet', children=('img_mlp',), shared_scales=(scale,))

    def __init__(self):
        nn.Module.__init__(self)
        self.backbone = quantize_(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1)))
        self.img_mlp = nn.Sequential(nn.Conv1d(2, 2, 1))

    made = parts._quant_type(part, type('Base', (nn.Module,), {'__init__': __init__}))()
    assert made.backbone[1].input_group is made.img_mlp[0].input_group is not None
    lifecycle.configure(made, Recipe.from_dict({}))
    assert made.backbone[1].input_quantizer is made.img_mlp[0].input_quantizer
    assert made.backbone[0].input_quantizer is not made.img_mlp[0].input_quantizer


def test_gradients_reach_every_float_weight(build_model, points):
    model = build_model(TOY[1])
    lifecycle.configure(model, Recipe.from_dict({'target': 'simulation', 'mode': 'qat'}))

    def forward(frame):
        inputs = model.data_preprocessor({'inputs': {'points': [frame]}, 'data_samples': []}, True)['inputs']
        return model.pts_bbox_head(model.extract_feat(inputs, [{}])[1])

    lifecycle.calibrate(model, [points], forward)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.train()
    tasks = forward(points)
    sum(v.square().mean() for task in tasks for v in task[0].values()).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_model_without_a_recipe_does_not_run(build_model, points, raw_outputs):
    with pytest.raises(ValueError, match='QuantHook'):
        raw_outputs(build_model(TOY[1]), points)


def test_a_quantized_checkpoint_needs_no_hook(build_model, points, raw_outputs, tmp_path):
    recipe = Recipe.from_dict({'target': 'simulation', 'skip': ['pts_bbox_head.task_heads.0.heatmap.1']})
    model = build_model(TOY[1])
    lifecycle.configure(model, recipe)
    lifecycle.calibrate(model, [points], lambda frame: raw_outputs(model, frame))
    checkpoints.save_checkpoint(model, recipe, tmp_path / 'q.pth')
    other = build_model(TOY[1])
    load_state_dict(other, torch.load(tmp_path / 'q.pth', weights_only=True)['state_dict'], strict=True)
    for (name, a), b in zip(raw_outputs(model, points).items(), raw_outputs(other, points).values()):
        assert torch.equal(a, b), name


def quantized_names(cfg):
    """The config with Quant before every type of the table, and how many there were."""
    names, found = {p.base for p in PARTS}, 0
    for part in cfg.values():
        if isinstance(part, dict) and part.get('type') in names:
            part['type'] = f'Quant{part["type"]}'
            found += 1
    return cfg, found


@pytest.mark.parametrize(
    ('config', 'parts'),
    [
        ('pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-car.py', 4),
        ('second/second_hv_secfpn_8xb6-80e_kitti-3d-car.py', 4),
        ('centerpoint/centerpoint_pillar02_second_secfpn_8xb4-cyclic-20e_nus-3d.py', 4),
    ],
)
def test_other_detectors_off_is_float(config, parts, randomized, wheel_config, points):
    torch.manual_seed(0)
    reference = randomized(MODELS.build(wheel_config(config)))
    cfg, found = quantized_names(wheel_config(config))
    assert found == parts
    model = MODELS.build(cfg)
    lifecycle.configure(model, Recipe.from_dict({'target': 'simulation', 'mode': 'float'}))
    load(model, reference)
    assert all(r.quantized or r.note == 'switched off' for r in coverage(model))
    # KITTI looks ahead only, and has no time channel.
    points = points.clone()
    points[:, 0].abs_()
    if not hasattr(model, 'pts_bbox_head'):
        points = points[:, :4]

    def forward(detector):
        detector.eval()
        batch = {'inputs': {'points': [points]}, 'data_samples': []}
        with torch.no_grad():
            inputs = detector.data_preprocessor(batch, False)['inputs']
            if hasattr(detector, 'pts_bbox_head'):
                out = detector.pts_bbox_head(detector.extract_feat(inputs, [{}])[1])
                return [v for task in out for v in task[0].values()]
            return [level for kind in detector.bbox_head(detector.extract_feat(inputs)) for level in kind]

    for got, expected in zip(forward(model), forward(reference)):
        assert relative_error(got, expected) < 1e-4
