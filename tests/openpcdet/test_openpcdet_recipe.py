"""The recipe as it stands in OpenPCDet's YAML."""

import pytest
from easydict import EasyDict

from q3d_plugin.errors import Q3DError
from q3d_plugin.openpcdet.recipe import check_model_cfg, quant_names, recipe_from
from q3d_plugin.recipe import Recipe

FLOAT = {'NAME': 'CenterPoint', 'VFE': {'NAME': 'MeanVFE'}, 'BACKBONE_2D': {'NAME': 'BaseBEVBackbone'}}
QUANT = {**FLOAT, 'NAME': 'QuantCenterPoint', 'BACKBONE_2D': {'NAME': 'QuantBaseBEVBackbone'}}


def test_it_is_the_same_schema_in_upper_case():
    given = EasyDict(
        MODE='qat',
        TARGET='simulation',
        WEIGHT=dict(BITS=4, CALIBRATOR='mse'),
        ACTIVATION=dict(BITS=8, UNSIGNED='auto', CALIBRATOR='percentile', PERCENTILE=99.9),
        SKIP=['*hm.1'],
        OVERRIDES=[dict(LAYERS='*deblocks*', WEIGHT=dict(BITS=16), ACTIVATION=None)],
        CALIBRATION=dict(SPLIT='val', FRAMES=7, SEED=3),
        SMOOTHQUANT=dict(
            ALPHA='search', LAYERS=['*'], GRID=[0, 0.5], OVERRIDES=[dict(LAYERS='*hm*', ALPHA=None)]
        ),
    )
    expected = dict(
        mode='qat',
        target='simulation',
        weight=dict(bits=4, calibrator='mse'),
        activation=dict(bits=8, unsigned='auto', calibrator='percentile', percentile=99.9),
        skip=['*hm.1'],
        overrides=[dict(layers='*deblocks*', weight=dict(bits=16), activation=None)],
        calibration=dict(split='val', frames=7, seed=3),
        smoothquant=dict(
            alpha='search', layers=['*'], grid=[0, 0.5], overrides=[dict(layers='*hm*', alpha=None)]
        ),
    )
    recipe = recipe_from(given)
    assert recipe == Recipe.from_dict(expected)
    # Nothing of EasyDict is left, which a weights_only load would refuse.
    assert {type(o.weight) for o in recipe.overrides} == {dict}
    assert recipe_from(None) == recipe_from({}) == Recipe()
    assert recipe_from({'WEIGHT': None}).weight is None


@pytest.mark.parametrize(
    ('given', 'words'),
    [
        ({'WIEGHT': {}}, ['MODEL.QUANT.WIEGHT: unknown key', "'WEIGHT'"]),
        ({'weight': {}}, ['MODEL.QUANT.weight: unknown key', "'WEIGHT'"]),
        ({'WEIGHT': {'BIT': 4}}, ['MODEL.QUANT.WEIGHT.BIT: unknown key', "'BITS'"]),
        ({'WEIGHT': {'BITS': 0}}, ['MODEL.QUANT.WEIGHT.BITS: 0 was given', '2 to 16']),
        ({'WEIGHT': 8}, ['MODEL.QUANT.WEIGHT: 8 was given', 'BITS, CALIBRATOR']),
        ({'CALIBRATION': None}, ['MODEL.QUANT.CALIBRATION: None was given', 'SPLIT, FRAMES, SEED']),
        ({'ACTIVATION': {'CALIBRATOR': 'MSE'}}, ["MODEL.QUANT.ACTIVATION.CALIBRATOR: 'MSE'", "'mse'"]),
        ({'MODE': 'PTQ'}, ["MODEL.QUANT.MODE: 'PTQ' was given", "'ptq'"]),
        ({'OVERRIDES': [{'WEIGHT': {'BITS': 4}}]}, ['MODEL.QUANT.OVERRIDES[0].LAYERS: missing']),
        (
            {'OVERRIDES': [{'LAYERS': 'a', 'WEIGHT': {'BITS': 99}}]},
            ['MODEL.QUANT.OVERRIDES[0].WEIGHT.BITS: 99'],
        ),
        ({'TARGET': 'tensorrrt'}, ["MODEL.QUANT.TARGET: 'tensorrrt' was given", "did you mean 'tensorrt'"]),
        (
            {'OVERRIDES': [{'LAYERS': 'a', 'ACTIVATION': {'UNSIGNED': True}}]},
            ['MODEL.QUANT.OVERRIDES[0].ACTIVATION.UNSIGNED: True was given', "TARGET 'tensorrt' cannot run"],
        ),
        ({'OVERRIDES': {'LAYERS': 'a'}}, ['MODEL.QUANT.OVERRIDES: ', 'a list of dictionaries']),
        ({'OVERRIDES': ['a']}, ["MODEL.QUANT.OVERRIDES[0]: 'a' was given", 'LAYERS, WEIGHT, ACTIVATION']),
        (7, ['MODEL.QUANT: 7 was given']),
        ({'SMOOTHQUANT': 0.5}, ['MODEL.QUANT.SMOOTHQUANT: 0.5 was given', 'ALPHA, LAYERS']),
        ({'SMOOTHQUANT': {'ALPA': 0.5}}, ['MODEL.QUANT.SMOOTHQUANT.ALPA: unknown key', "'ALPHA'"]),
        ({'SMOOTHQUANT': {'ALPHA': 1.5}}, ['MODEL.QUANT.SMOOTHQUANT.ALPHA: 1.5 was given', '0 to 1']),
        (
            {'SMOOTHQUANT': {'OVERRIDES': [{'LAYERS': 'a', 'ALPHA': -1}]}},
            ['MODEL.QUANT.SMOOTHQUANT.OVERRIDES[0].ALPHA: -1 was given'],
        ),
    ],
)
def test_mistakes_name_the_key_as_it_is_written(given, words):
    with pytest.raises(Q3DError) as caught:
        recipe_from(given)
    for word in words:
        assert word in str(caught.value)


def test_quant_names_are_found_by_their_place():
    assert quant_names(QUANT) == {
        'MODEL.NAME': 'QuantCenterPoint',
        'MODEL.BACKBONE_2D.NAME': 'QuantBaseBEVBackbone',
    }


def test_recipe_and_names_go_together():
    assert check_model_cfg(EasyDict(FLOAT)) is None
    assert check_model_cfg(EasyDict(QUANT, QUANT={'MODE': 'float'})).mode == 'float'


@pytest.mark.parametrize(
    ('model_cfg', 'words'),
    [
        ({**QUANT, 'QUNT': {}}, ["MODEL.QUNT: unknown key; did you mean 'QUANT'?"]),
        ({**QUANT, 'Quant': {}}, ["MODEL.Quant: unknown key; did you mean 'QUANT'?"]),
        (QUANT, ['MODEL.QUANT: missing', "MODEL.NAME is 'QuantCenterPoint'"]),
        ({**FLOAT, 'QUANT': {}}, ['MODEL.QUANT: there is a recipe', "MODEL.BACKBONE_2D.NAME is 'BaseBEV"]),
        ({**FLOAT, 'NAME': 'QuantCenterPoint', 'QUANT': {}}, ['nothing would be quantized']),
        ({**QUANT, 'NAME': 'CenterPoint', 'QUANT': {}}, ["MODEL.NAME: 'CenterPoint'", "'QuantCenterPoint'"]),
        ({**QUANT, 'QUANT': {'MODES': 'ptq'}}, ["MODEL.QUANT.MODES: unknown key; did you mean 'MODE'?"]),
    ],
)
def test_one_without_the_other(model_cfg, words):
    with pytest.raises(Q3DError) as caught:
        check_model_cfg(EasyDict(model_cfg))
    for word in words:
        assert word in str(caught.value)
