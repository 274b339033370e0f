"""OpenPCDet's Swin backbone, of BEVFusion: set OPENPCDET_ROOT to a checkout."""

import os

import pytest
import torch
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
    largest_difference,
    original_names,
    pair,
    real_image,
    recovered,
    smoothed,
    trained_like_,
)

from q3d_plugin import lifecycle
from q3d_plugin.coverage import coverage

ROOT = os.environ.get('OPENPCDET_ROOT')
pytestmark = [
    pytest.mark.skipif(not ROOT, reason='OPENPCDET_ROOT is not set'),
    pytest.mark.usefixtures('registered'),
]
DEFAULTS = dict(window_size=7, mlp_ratio=4, drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.2)
real = pytest.mark.skipif(not PICTURES, reason='the real nuScenes frame is not here')


@pytest.fixture(scope='module')
def registered():
    """OpenPCDet with the adapter's types."""
    from q3d_plugin import openpcdet

    openpcdet.register(ROOT)


def _build(quantized, **settings):
    """A backbone from settings with mmdet's names."""
    from easydict import EasyDict

    from q3d_plugin.openpcdet.registries import registry_of

    config = EasyDict({key.upper(): value for key, value in {**DEFAULTS, **settings}.items()})
    return registry_of('IMAGE_BACKBONE')['QuantSwinTransformer' if quantized else 'SwinTransformer'](config)


# The cameras of one sample.
PCDET = Swin(_build, lambda model, x: model({'camera_imgs': x[None]})['image_features'])


@pytest.mark.parametrize('name', VARIANTS)
def test_off_is_float_at_every_layer(name):
    source, model = pair(PCDET, {**SMALL, **VARIANTS[name]})
    assert largest_difference(PCDET, model, source, image()) < 1e-5
    check_frozen(source, model, name == 'frozen')


@real
def test_full_size_off_is_float_at_every_layer_on_the_real_image():
    source, model = pair(PCDET, TINY)
    assert largest_difference(PCDET, model, source, real_image()) < 1e-4


def test_every_layer_is_quantized_and_each_product_can_be_switched_on():
    _, model = pair(PCDET, SMALL, dict(include=['*.query_key']))
    calibrate(PCDET, model, image())
    rows = [r for r in coverage(model) if r.kind != 'LayerNorm']
    assert {r.name for r in rows if not r.quantized} == {
        r.name for r in rows if '.attention_value.' in r.name
    }
    assert len(rows) == 1 + 4 * 4 + 1 + 4 * 4


def test_recomputed_blocks_have_the_same_gradients():
    check_recomputed(PCDET)


def test_pretrained_weights_are_loaded_as_into_the_float_type(tmp_path):
    from easydict import EasyDict

    state = trained_like_(built(PCDET, False, SMALL), seed=3).state_dict()
    path = tmp_path / 'swin.pth'
    torch.save({'model': original_names(state)}, path)
    init = EasyDict(type='Pretrained', checkpoint=str(path))
    settings = dict(SMALL, convert_weights=True, init_cfg=init)
    source, model = (built(PCDET, quantized, settings) for quantized in (False, True))
    for backbone in (source, model):
        backbone.init_weights()
    parameters = dict(source.named_parameters())
    assert torch.equal(parameters['stages.1.blocks.0.norm1.weight'], state['stages.1.blocks.0.norm1.weight'])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('alpha', [0.5, 1.0, 'search'])
def test_off_is_float_after_smoothing(name, alpha):
    source, model = smoothed(PCDET, alpha, {**SMALL, **VARIANTS[name]}, image())
    explicit = {n for n, u in lifecycle.units(model) if getattr(u, 'smoothing', False)}
    # Without a norm the reduction reads the residual stream.
    without = ('projection', 'ffn.layers.1') + (('reduction',) if 'no norm' in name else ())
    assert alpha == 'search' or explicit == {n for n, _ in lifecycle.units(model) if n.endswith(without)}
    lifecycle.set_enabled(model, False)
    assert largest_difference(PCDET, model, source, image(), per_layer=False) < 1e-5


@real
@pytest.mark.parametrize('alpha', [0.5, 1.0])
def test_full_size_off_is_float_after_smoothing_on_the_real_image(alpha):
    source, model = smoothed(PCDET, alpha, TINY, real_image())
    lifecycle.set_enabled(model, False)
    assert largest_difference(PCDET, model, source, real_image(), per_layer=False) < 1e-4


@pytest.mark.parametrize('alpha', [0.5, 'search'])
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_smoothquant_recovers_most_of_what_outliers_cost(seed, alpha):
    assert recovered(PCDET, SMALL, image(), seed, alpha) > 0.8
