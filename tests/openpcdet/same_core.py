"""The backbones of CenterPoint-Voxel in both frameworks: same weights, calibrated on the same voxels."""

import importlib

import numpy as np
import torch
from easydict import EasyDict
from openpcdet_double import randomize
from torch.nn.modules.batchnorm import _BatchNorm

from q3d_plugin import lifecycle
from q3d_plugin.recipe import Recipe

GRID = (128, 128, 40)  # x, y, z
LAYERS = {'LAYER_NUMS': [2, 2], 'LAYER_STRIDES': [1, 2], 'NUM_FILTERS': [32, 48]}
UPSAMPLING = {'UPSAMPLE_STRIDES': [1, 2], 'NUM_UPSAMPLE_FILTERS': [32, 32]}
RECIPE = {'activation': {'calibrator': 'mse'}, 'calibration': {'frames': 2}}


class OpenPCDetChain(torch.nn.Module):
    """Sparse and 2D backbone as OpenPCDet's detectors call them."""

    def __init__(self, package, quant):
        super().__init__()
        models = f'{package}.models'

        def part(module, name):
            return importlib.import_module(f'{models}.{module}').__all__[f'Quant{name}' if quant else name]

        self.sparse = part('backbones_3d', 'VoxelResBackBone8x')(EasyDict(USE_BIAS=False), 5, np.array(GRID))
        bev = importlib.import_module(f'{models}.backbones_2d.map_to_bev').__all__['HeightCompression']
        self.bev = bev(EasyDict(NUM_BEV_FEATURES=256))
        self.dense = part('backbones_2d', 'BaseBEVBackbone')(EasyDict(**LAYERS, **UPSAMPLING), 256)

    def forward(self, features, coordinates, frames):
        batch = {'voxel_features': features, 'voxel_coords': coordinates, 'batch_size': frames}
        return self.dense(self.bev(self.sparse(batch)))['spatial_features_2d']


class MMDetection3DChain(torch.nn.Module):
    """The same of MMDetection3D."""

    def __init__(self, quant):
        super().__init__()
        from mmdet3d.registry import MODELS

        import q3d_plugin.mmdet3d  # noqa: F401

        prefix = 'Quant' if quant else ''
        norm = dict(eps=1e-3, momentum=0.01)
        self.sparse = MODELS.build(
            dict(
                type=f'{prefix}SparseEncoder',
                in_channels=5,
                sparse_shape=[GRID[2] + 1, GRID[1], GRID[0]],
                output_channels=128,
                order=('conv', 'norm', 'act'),
                encoder_channels=((16, 16, 32), (32, 32, 64), (64, 64, 128), (128, 128)),
                encoder_paddings=((0, 0, 1), (0, 0, 1), (0, 0, [0, 1, 1]), (0, 0)),
                block_type='basicblock',
                norm_cfg=dict(type='BN1d', **norm),
            )
        )
        self.dense = MODELS.build(
            dict(
                type=f'{prefix}SECOND',
                in_channels=256,
                out_channels=LAYERS['NUM_FILTERS'],
                layer_nums=LAYERS['LAYER_NUMS'],
                layer_strides=LAYERS['LAYER_STRIDES'],
                norm_cfg=dict(type='BN', **norm),
            )
        )
        self.neck = MODELS.build(
            dict(
                type=f'{prefix}SECONDFPN',
                in_channels=LAYERS['NUM_FILTERS'],
                out_channels=UPSAMPLING['NUM_UPSAMPLE_FILTERS'],
                upsample_strides=UPSAMPLING['UPSAMPLE_STRIDES'],
                norm_cfg=dict(type='BN', **norm),
            )
        )

    def forward(self, features, coordinates, frames):
        return self.neck(self.dense(self.sparse(features, coordinates.int(), frames)))[0]


def mapped(source, target):
    """The weights of ``source`` under the names of ``target``, both float: module by module, in order.

    OpenPCDet's residual blocks have biases before their BatchNorms, which are folded into the mean here.
    """
    state = target.state_dict()

    def layers(model):
        kinds = (_BatchNorm, torch.nn.Conv2d, torch.nn.ConvTranspose2d)
        found = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds) or hasattr(m, 'conv1x1')]
        return [(n, m) for n, m in found if not isinstance(m, _BatchNorm)], [
            (n, m) for n, m in found if isinstance(m, _BatchNorm)
        ]

    (convs, norms), (target_convs, target_norms) = layers(source), layers(target)
    assert len(convs) == len(norms) == len(target_convs) == len(target_norms)
    for (_, conv), (_, norm), (conv_name, mine), (norm_name, _) in zip(
        convs, norms, target_convs, target_norms
    ):
        assert mine.weight.shape == conv.weight.shape, conv_name
        state[f'{conv_name}.weight'] = conv.weight.detach()
        for key, value in norm.state_dict().items():
            state[f'{norm_name}.{key}'] = value
        if conv.bias is not None:
            state[f'{norm_name}.running_mean'] = norm.running_mean - conv.bias.detach()
    return state


def frames(count=2):
    """Voxels and features of some frames: features, coordinates (batch, z, y, x)."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(count):
        cells = torch.randperm(GRID[0] * GRID[1] * 20, generator=draw)[:6000]
        z, rest = cells // (GRID[0] * GRID[1]), cells % (GRID[0] * GRID[1])
        coordinates = torch.stack([torch.zeros_like(z), z, rest // GRID[0], rest % GRID[0]], 1)
        yield torch.randn(6000, 5, generator=draw), coordinates.int()


def calibrated(model):
    """``model`` with the ranges of :func:`frames`."""
    lifecycle.configure(model, Recipe.from_dict({'target': 'simulation', **RECIPE}))
    with torch.no_grad():
        lifecycle.calibrate(model.eval(), list(frames()), lambda f: model(*f, 1))
    return model


def ranges(model):
    """Of every unit with quantizers in the order of the modules: kind, input range, weight ranges."""
    out = []
    for _, unit in lifecycle.units(model):
        weight = getattr(unit, 'weight_quantizer', None)
        out.append(
            (unit.kind, unit.input_quantizer._amax.item(), None if weight is None else weight._amax.clone())
        )
    return sorted(out, key=lambda r: r[0])  # stable: additions and the concatenation stand elsewhere


def check_both(package):
    """Asserts that the ranges are the same within 1e-5 through both adapters; returns how many units."""
    torch.manual_seed(0)
    float_pcdet = randomize(OpenPCDetChain(package, quant=False)).eval()
    float_mmdet = MMDetection3DChain(quant=False).eval()
    state = mapped(float_pcdet, float_mmdet)
    float_mmdet.load_state_dict(state)
    for f in frames(1):
        a, b = float_pcdet(*f, 1), float_mmdet(*f, 1)
        assert torch.allclose(a, b, atol=1e-4 * float(a.abs().max()))
    pcdet, mmdet = OpenPCDetChain(package, quant=True), MMDetection3DChain(quant=True)
    pcdet.load_state_dict(float_pcdet.state_dict())
    mmdet.load_state_dict(state)
    ours, theirs = ranges(calibrated(pcdet)), ranges(calibrated(mmdet))
    assert [r[0] for r in ours] == [r[0] for r in theirs]
    for (kind, activation, weight), (_, other_activation, other_weight) in zip(ours, theirs):
        assert abs(activation - other_activation) <= 1e-5 * activation, kind
        if weight is not None:
            assert torch.allclose(weight, other_weight, rtol=1e-5, atol=0)
    return len(ours)
