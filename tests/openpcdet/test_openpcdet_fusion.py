"""OpenPCDet's BEVFusion against the float types of the contract double: results, shared scales, bad input."""

import copy
import json
import logging

import pytest
import torch
from easydict import EasyDict
from openpcdet_double import CLASSES, DATA, MODEL, randomize

from q3d_plugin import lifecycle
from q3d_plugin.coverage import NORMALIZATION, coverage
from q3d_plugin.errors import Q3DError
from q3d_plugin.layers import QuantConcat
from q3d_plugin.transforms.sharing import check_sharing, found_groups

HEAD = {
    'NAME': 'TransFusionHead',
    'NUM_PROPOSALS': 4,
    'HIDDEN_CHANNEL': 8,
    'NUM_HEADS': 2,
    'NMS_KERNEL_SIZE': 3,
    'FFN_CHANNEL': 16,
    'DROPOUT': 0.1,
    'ACTIVATION': 'relu',
    'NUM_HM_CONV': 2,
    'SEPARATE_HEAD_CFG': {
        'HEAD_DICT': {
            n: {'out_channels': 2, 'num_conv': 2} for n in ('center', 'height', 'dim', 'rot', 'vel')
        }
    },
    'TARGET_ASSIGNER_CONFIG': {'FEATURE_MAP_STRIDE': 8},
}
CAMERAS = {
    'NAME': 'BevFusion',
    'IMAGE_BACKBONE': {'NAME': 'SwinTransformer', 'CHANNELS': [4, 6, 8]},
    'NECK': {
        'NAME': 'GeneralizedLSSFPN',
        'IN_CHANNELS': [4, 6, 8],
        'OUT_CHANNELS': 8,
        'START_LEVEL': 0,
        'END_LEVEL': -1,
        'NUM_OUTS': 3,
    },
    'VTRANSFORM': {'NAME': 'DepthLSSTransform', 'IN_CHANNEL': 8, 'OUT_CHANNEL': 4, 'DEPTHS': 5, 'CELLS': 4},
    'FUSER': {'NAME': 'ConvFuser', 'IN_CHANNEL': 4 + 256, 'OUT_CHANNEL': 256},
    'DENSE_HEAD': HEAD,
}
IMAGES = {'VIEWS': 2, 'SIZE': [32, 48]}
GROUPS = [
    {'neck.concats.0', 'neck.lateral_convs.0.conv'},
    {'neck.concats.1', 'neck.lateral_convs.1.conv'},
    {'vtransform.concat', 'vtransform.depthnet.0'},
    {'fuser.concat', 'fuser.conv.0'},
    {'backbone_2d.blocks.1.1', 'backbone_2d.deblocks.0.0'},
    {'backbone_2d.concat', 'dense_head.shared_conv'},
    {f'dense_head.decoder.self_attn.{n}_proj' for n in 'qkv'},
    {f'dense_head.prediction_head.{n}.0.0' for n in ('center', 'height', 'dim', 'rot', 'vel', 'heatmap')},
]
LIDAR_ONLY = 'image_backbone, neck, vtransform, fuser'


@pytest.fixture
def make_fusion(adapter, toy_set):
    """Builds the detector of the double: ``make_fusion(quant)``; float without ``quant``."""

    def build(quant=None, cameras=IMAGES):
        cfg, data = EasyDict(copy.deepcopy({**MODEL, **CAMERAS})), EasyDict(DATA, DATA_PATH=str(toy_set))
        if cameras is not None:
            data.CAMERA_CONFIG = EasyDict(cameras)
        if quant is not None:
            cfg.QUANT = EasyDict(quant)
            for section in ('BACKBONE_3D', 'BACKBONE_2D', 'DENSE_HEAD', *CAMERAS):
                part = cfg if section == 'NAME' else cfg[section]
                part.NAME = f'Quant{part.NAME.removeprefix("Quant")}'
        made = adapter.pcdet_datasets.build_dataloader(
            data, CLASSES, 1, False, workers=0, logger=logging.getLogger('double'), training=False
        )
        torch.manual_seed(0)
        return randomize(adapter.pcdet_models.build_network(cfg, len(CLASSES), made[0])).eval()

    return build


@pytest.fixture
def float_fusion(make_fusion, tmp_path):
    """A float checkpoint with random weights."""
    path = tmp_path / 'fusion.pth'
    torch.save({'model_state': make_fusion().state_dict(), 'epoch': 1, 'it': 1}, path)
    return path


@pytest.fixture
def calibrated(make_fusion, float_fusion, run_logger, outputs):
    """Builds and calibrates: ``calibrated(quant)``."""

    def build(quant=None):
        model = make_fusion(quant or {})
        model.load_params_from_file(str(float_fusion), run_logger)
        outputs(model)
        return model

    return build


def test_off_is_float(make_fusion, outputs):
    reference, model = make_fusion(), make_fusion({'MODE': 'float'})
    model._load_state_dict(reference.state_dict(), strict=False)
    expected, got = outputs(reference), outputs(model)
    assert expected.keys() == got.keys() and len(got) == 8
    for name, value in expected.items():
        assert (got[name] - value).abs().max() <= 1e-4 * value.abs().max(), name


def test_groups_are_those_of_the_study(make_fusion):
    groups = {}
    for name, unit in lifecycle.units(make_fusion({'INCLUDE': ['dense_head']})):
        groups.setdefault(id(unit.input_quantizer), set()).add(name)
    # Residual additions are tested with their blocks.
    found = [g for g in groups.values() if len(g) > 1 and not any(n.endswith('.add') for n in g)]
    assert sorted(map(sorted, found)) == sorted(map(sorted, GROUPS))


def test_whoever_reads_a_tensor_of_a_concatenation_has_its_scale(calibrated, outputs):
    model = calibrated({'INCLUDE': ['dense_head']})
    named = dict(lifecycle.units(model))
    concatenations = {n for n, unit in named.items() if isinstance(unit, QuantConcat)}
    assert len(concatenations) == 5
    for group in found_groups(model, lambda: outputs(model)):
        if concatenations.intersection(group):
            assert len({id(named[n].input_quantizer) for n in group}) == 1, group
    assert check_sharing(model, lambda: outputs(model)).together == []


def test_the_head_is_float_unless_it_is_included(calibrated):
    rows = [row for row in coverage(calibrated()) if row.note != NORMALIZATION]
    head = [row for row in rows if row.name.startswith('dense_head')]
    assert len(head) == 30 and all(not row.quantized and 'Q-DETR' in row.note for row in head)
    assert all(row.quantized for row in rows if row not in head)
    rows = coverage(calibrated({'INCLUDE': ['dense_head.decoder', '*heatmap_head*']}))
    included = [row.name for row in rows if row.quantized and row.name.startswith('dense_head')]
    assert len(included) == 14 + 2


def test_gradients_reach_the_cameras(calibrated, batch):
    model = calibrated({'MODE': 'qat'})
    frame = batch(model)
    for module in model.module_list[:-1]:
        frame = module(frame)
    frame['spatial_features_2d'].square().mean().backward()
    for part in (model.image_backbone, model.neck, model.vtransform, model.fuser):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_checkpoint_without_cameras_names_the_parts_that_it_lacks(make_fusion, run_logger, tmp_path):
    state = make_fusion().state_dict()
    lidar = {k: v for k, v in state.items() if not k.startswith(tuple(LIDAR_ONLY.split(', ')))}
    torch.save({'model_state': lidar}, tmp_path / 'lidar.pth')
    with pytest.raises(Q3DError, match=f'lidar.pth.*no weights at all of {LIDAR_ONLY}, which') as caught:
        make_fusion({}).load_params_from_file(str(tmp_path / 'lidar.pth'), run_logger)
    assert '\n' not in str(caught.value)


def test_a_frame_without_images_is_refused(calibrated, batch):
    model = calibrated()
    frame = batch(model)
    del frame['camera_imgs']
    with pytest.raises(Q3DError, match='camera images: .* the frame none: DATA_CONFIG.CAMERA_CONFIG'):
        model(frame)


@pytest.mark.parametrize('shape', [(1, 3, 3, 32, 48), (1, 2, 3, 64, 48)])
def test_other_images_than_in_calibration_are_refused(calibrated, batch, shape):
    model = calibrated()
    frame = batch(model)
    frame['camera_imgs'] = torch.zeros(shape)
    words = f'{shape[1]} of {shape[3]} x {shape[4]} pixels .*calibrated with 2 of 32 x 48'
    with pytest.raises(Q3DError, match=words):
        model(frame)


def test_calibration_frames_that_differ_are_refused(make_fusion, float_fusion, run_logger, toy_set, outputs):
    infos = [{'token': f'train{i}', 'seed': i, 'views': 2 + (i == 1)} for i in range(3)]
    (toy_set / 'v1.0-mini' / 'train.json').write_text(json.dumps(infos))
    model = make_fusion({})
    model.load_params_from_file(str(float_fusion), run_logger)
    with pytest.raises(Q3DError, match='of 32 x 48 pixels .* were given, but .* calibrated with'):
        outputs(model)


def test_the_images_of_calibration_travel_with_the_checkpoint(
    calibrated, make_fusion, run_logger, tmp_path, batch, outputs
):
    calibrated()
    model = make_fusion({})
    model.load_params_from_file(str(tmp_path / 'run' / 'quantized.pth'), run_logger)
    outputs(model)
    frame = batch(model)
    frame['camera_imgs'] = torch.zeros(1, 3, 3, 32, 48)
    with pytest.raises(Q3DError, match='calibrated with 2 of 32 x 48'):
        model(frame)
