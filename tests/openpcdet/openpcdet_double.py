"""The contract double of OpenPCDet under any name, and what the tests build with it."""

import contextlib
import importlib.util
import sys
from pathlib import Path

import torch
from torch.nn.modules.batchnorm import _BatchNorm

DOUBLE = Path(__file__).resolve().parent / 'pcdet_double'
HEAD = {
    'center': {'out_channels': 2, 'num_conv': 2},
    'dim': {'out_channels': 3, 'num_conv': 1},
}
MODEL = {
    'NAME': 'CenterPoint',
    'VFE': {'NAME': 'MeanVFE'},
    'BACKBONE_3D': {'NAME': 'VoxelResBackBone8x'},
    'MAP_TO_BEV': {'NAME': 'HeightCompression', 'NUM_BEV_FEATURES': 256},
    'BACKBONE_2D': {
        'NAME': 'BaseBEVBackbone',
        'LAYER_NUMS': [1, 1],
        'LAYER_STRIDES': [1, 2],
        'NUM_FILTERS': [8, 12],
        'UPSAMPLE_STRIDES': [1, 2],
        'NUM_UPSAMPLE_FILTERS': [8, 8],
    },
    'DENSE_HEAD': {
        'NAME': 'CenterHead',
        'CLASS_NAMES_EACH_HEAD': [['car'], ['truck', 'bus']],
        'SHARED_CONV_CHANNEL': 8,
        'USE_BIAS_BEFORE_NORM': True,
        'NUM_HM_CONV': 2,
        'SEPARATE_HEAD_CFG': {'HEAD_DICT': HEAD},
    },
}
DATA = {
    'DATASET': 'NuScenesDataset',
    'VERSION': 'v1.0-mini',
    'DATA_SPLIT': {'train': 'train', 'test': 'val'},
    'INFO_PATH': {'train': ['train.json'], 'test': ['val.json']},
    'POINT_CLOUD_RANGE': [0, 0, 0, 32, 32, 40],
    'VOXEL_SIZE': [1, 1, 1],
    'SHUFFLE': True,
}
CLASSES = ['car', 'truck', 'bus']


def load_double(name):
    """Imports the double under any name."""
    spec = importlib.util.spec_from_file_location(
        name, DOUBLE / '__init__.py', submodule_search_locations=[str(DOUBLE)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def double_as_pcdet():
    """The double is ``pcdet`` inside, for an adapter that is imported anew."""
    packages = ('pcdet', 'q3d_plugin.openpcdet')

    def take():
        found = [k for k in sys.modules if k in packages or k.startswith(tuple(f'{p}.' for p in packages))]
        return {k: sys.modules.pop(k) for k in found}

    before = take()
    try:
        yield load_double('pcdet')
    finally:
        take()
        sys.modules.update(before)


def randomize(model, seed=0):
    """Gives every BatchNorm statistics and parameters of its own: the defaults fold to almost nothing."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model
