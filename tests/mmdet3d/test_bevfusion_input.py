"""What users can get wrong with BEVFusion, and the configs that come with the plugin."""

import copy
import os
from pathlib import Path
from unittest import mock

import bevfusion_double as toy
import pytest
import torch
from mmdet3d.registry import MODELS
from mmengine.config import Config
from mmengine.runner.checkpoint import load_state_dict

from q3d_plugin import checkpoints, lifecycle
from q3d_plugin.errors import Q3DError
from q3d_plugin.mmdet3d import parts
from q3d_plugin.mmdet3d.projects import import_bevfusion
from q3d_plugin.mmdet3d.quant_types import put_quant_types, take_quant_types
from q3d_plugin.mmdet3d.work_dir import work_dir_of
from q3d_plugin.recipe import Recipe

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='the double has no compiled operators')

CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / 'mmdet3d'
SHIPPED = ('bevfusion_lidar_w8a8.py', 'bevfusion_lidar-cam_swint_w8a8.py', 'bevfusion_lidar-cam_r50_w8a8.py')
PROJECT = [part for part in parts.PARTS if part.project]
LIDAR_ONLY = 'img_backbone, img_neck, view_transform, fusion_layer'


@pytest.fixture
def double():
    """The double is there, and imported."""
    with toy.checkout():
        import_bevfusion()
        yield


def quantized(cfg):
    """The quantized model of a config, configured."""
    put_quant_types(cfg)
    model = MODELS.build(cfg).eval()
    lifecycle.configure(model, Recipe.from_dict({}))
    return model


# Where the types are.


def registered(name):
    return MODELS.module_dict.get(parts.quant_name(name))


@pytest.mark.parametrize('plugin_first', [True, False])
def test_types_are_registered_once_the_project_is_imported_whatever_comes_first(plugin_first):
    with toy.checkout(registered=plugin_first):
        if plugin_first:
            assert not any(isinstance(registered(part.base), type) for part in PROJECT)
        import_bevfusion()
        if not plugin_first:
            parts.register_parts()
        for part in PROJECT:
            assert issubclass(registered(part.base), MODELS.get(part.base))


@pytest.mark.parametrize('part', PROJECT, ids=lambda p: p.base)
def test_a_type_that_is_asked_for_before_the_import_says_in_one_line_what_to_do(part, tmp_path):
    cfg = dict(type=parts.quant_name(part.base))
    with toy.checkout(tmp_path), pytest.raises(Q3DError) as caught:
        MODELS.build(cfg)
    message = str(caught.value)
    assert '\n' not in message and f'MMDET3D_ROOT={str(tmp_path)!r} has no projects/BEVFusion' in message
    assert 'set MMDET3D_ROOT to a source checkout of MMDetection3D' in message


def test_a_type_that_is_asked_for_before_the_import_is_imported():
    with toy.checkout():
        fuser = MODELS.build(dict(type='QuantConvFuser', in_channels=[4, 4], out_channels=4))
        assert type(fuser) is registered('ConvFuser')


def test_a_float_type_of_a_copy_of_the_project_will_do(tmp_path):
    with toy.checkout(tmp_path):

        @MODELS.register_module(name='ConvFuser')
        class ConvFuser(torch.nn.Sequential):
            def __init__(self, channels):
                super().__init__(torch.nn.Conv2d(channels, channels, 1))

        try:
            fuser = MODELS.build(dict(type='QuantConvFuser', channels=4))
            assert isinstance(fuser, ConvFuser) and fuser.concat.input_group is fuser[1].input_group
        finally:
            del MODELS.module_dict['ConvFuser']


def test_no_line_of_the_table_is_passed_over_in_silence():
    part = parts.Part('NobodyHasThis')
    try:
        assert parts._registered(part) is None
        with pytest.raises(Q3DError, match="QuantNobodyHasThis: .* no type 'NobodyHasThis'"):
            MODELS.build(dict(type='QuantNobodyHasThis'))
    finally:
        MODELS.module_dict.pop('QuantNobodyHasThis', None)
    assert all(registered(part.base) is not None for part in parts.PARTS)


# Configs.


@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_configs_add_quantization_alone(name, double):
    cfg = Config.fromfile(str(CONFIGS / name))
    base = 'lidar' if 'lidar_w8a8' in name else 'lidar-cam'
    (upstream,) = (toy.DOUBLE / 'projects/BEVFusion/configs').glob(f'bevfusion_{base}_*')
    expected = Config.fromfile(str(upstream))
    assert [hook.type for hook in cfg.custom_hooks] == ['QuantHook']
    Recipe.from_dict(cfg.custom_hooks[0].recipe.to_dict())
    model = cfg.model.to_dict()
    assert take_quant_types(model) == (9 if base == 'lidar-cam' else 5)
    expected = expected.model.to_dict()
    if 'img_backbone' in model:
        assert model['img_backbone'].get('init_cfg') is None  # the checkpoint has all weights
        image = {'r50': 'mmdet.ResNet', 'swint': 'mmdet.SwinTransformer'}[name.split('_')[2]]
        assert model.pop('img_backbone')['type'] == image
        del expected['img_backbone']
    if 'r50' in name:
        assert model['img_neck'].pop('in_channels') == [512, 1024, 2048]
        expected['img_neck'].pop('in_channels')
    assert model == expected


@pytest.mark.parametrize('name', SHIPPED)
def test_a_shipped_config_without_a_checkout_says_in_one_line_what_to_do(name, tmp_path):
    with toy.checkout(tmp_path), mock.patch.dict(os.environ):
        del os.environ['MMDET3D_ROOT']
        with pytest.raises(Q3DError, match='MMDET3D_ROOT is not set .*set MMDET3D_ROOT') as caught:
            work_dir_of([], CONFIGS / name)
    assert '\n' not in str(caught.value)


# Checkpoints.


def test_a_checkpoint_without_cameras_names_the_parts_that_it_lacks(double):
    lidar, model = MODELS.build(toy.lidar_config()), quantized(toy.fusion_config())
    with pytest.raises(Q3DError, match=f'^a.pth: of another model: .*{LIDAR_ONLY}, which') as caught:
        checkpoints.check_state_dict(model, lidar.state_dict(), 'a.pth')
    assert '\n' not in str(caught.value)


# Images.


@pytest.fixture
def calibrated(double, randomized):
    """A quantized model, calibrated."""
    model = quantized(toy.fusion_config())
    state = randomized(MODELS.build(toy.fusion_config())).state_dict()
    load_state_dict(model, state, strict=True)
    lifecycle.calibrate(model, [toy.frame()], lambda batch: toy.raw_outputs(model, batch))
    return model


def without_images():
    batch = toy.frame()
    del batch['inputs']['img']
    return batch


def test_a_frame_without_images_is_refused_calibrated_or_not(calibrated):
    for model in (calibrated, quantized(toy.fusion_config())):
        with pytest.raises(Q3DError, match='camera images: .* the frame none: the pipeline has to'):
            toy.raw_outputs(model, without_images())


@pytest.mark.parametrize(
    ('given', 'words'),
    [
        ({'views': 3}, '3 of 64 x 176 pixels'),
        ({'views': 1}, '1 of 64 x 176 pixels'),
        ({'image': (64, 192)}, '2 of 64 x 192 pixels'),
    ],
)
def test_other_images_than_in_calibration_are_refused(calibrated, given, words):
    with pytest.raises(Q3DError, match=f'{words} .*were given, .*calibrated with 2 of 64 x 176'):
        toy.raw_outputs(calibrated, toy.frame(**given))


def test_calibration_frames_that_differ_are_refused(double):
    model = quantized(toy.fusion_config())
    with pytest.raises(Q3DError, match='3 of 64 x 176 pixels .*calibrated with 2 of 64 x 176'):
        frames = [toy.frame(), toy.frame(views=3)]
        lifecycle.calibrate(model, frames, lambda batch: toy.raw_outputs(model, batch))


def test_the_images_of_calibration_travel_with_the_checkpoint(calibrated, tmp_path):
    recipe = Recipe.from_dict({})
    checkpoints.save_checkpoint(calibrated, recipe, tmp_path / 'q.pth')
    state = torch.load(tmp_path / 'q.pth', weights_only=True)
    model = quantized(toy.fusion_config())
    checkpoints.check_recipe_of(state['meta'], state['state_dict'], model, recipe)
    checkpoints.check_state_dict(model, state['state_dict'])
    load_state_dict(model, state['state_dict'], strict=True)
    toy.raw_outputs(model, toy.frame())
    with pytest.raises(Q3DError, match='calibrated with 2 of 64 x 176'):
        toy.raw_outputs(model, toy.frame(views=3))


def test_a_quantized_checkpoint_needs_no_recipe(calibrated):
    cfg = toy.fusion_config()
    put_quant_types(cfg)
    model = MODELS.build(cfg).eval()
    load_state_dict(model, copy.deepcopy(calibrated.state_dict()), strict=True)
    got, expected = (toy.raw_outputs(m, toy.frame()) for m in (model, calibrated))
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    with pytest.raises(Q3DError, match='calibrated with 2 of 64 x 176'):
        toy.raw_outputs(model, toy.frame(views=3))


def test_another_calibration_takes_other_images(calibrated):
    lifecycle.configure(calibrated, Recipe.from_dict({}))
    three = copy.deepcopy(toy.frame(views=3))
    lifecycle.calibrate(calibrated, [three], lambda batch: toy.raw_outputs(calibrated, batch))
    toy.raw_outputs(calibrated, three)
    with pytest.raises(Q3DError, match='calibrated with 3 of 64 x 176'):
        toy.raw_outputs(calibrated, toy.frame())


def test_switched_off_it_takes_any_images(calibrated):
    lifecycle.set_enabled(calibrated, False)
    toy.raw_outputs(calibrated, toy.frame(views=3))
