"""OpenPCDet's adapter on the contract double: Quant names put into a config and taken out, models of both."""

import importlib

import pytest
import torch
import yaml
from openpcdet_double import CLASSES, DATA, MODEL, randomize

from q3d_plugin import lifecycle
from q3d_plugin.errors import Q3DError
from q3d_plugin.layers import QuantUnit
from q3d_plugin.recipe import Recipe

RECIPE = {'target': 'simulation', 'weight': {'bits': 6}, 'calibration': {'frames': 2}}


@pytest.fixture
def build(adapter):
    """The module under test, on top of the double."""
    return importlib.import_module('q3d_plugin.openpcdet.build')


@pytest.fixture
def config_file(tmp_path, toy_set):
    """A float config of the double."""
    path = tmp_path / 'float.yaml'
    data = {**DATA, 'DATA_PATH': str(toy_set)}
    path.write_text(yaml.safe_dump({'CLASS_NAMES': CLASSES, 'DATA_CONFIG': data, 'MODEL': MODEL}))
    return path


@pytest.fixture
def frame(adapter, toy_set):
    """A batch of the double's data set."""
    from easydict import EasyDict

    data = EasyDict(DATA, DATA_PATH=str(toy_set), SHUFFLE=False)
    dataset, _, _ = adapter.pcdet_datasets.build_dataloader(data, CLASSES, 1, False, training=False)
    return dataset.collate_batch([dataset[0]])


def test_quant_names_are_put_in_and_taken_out_again(build, config_file):
    mine = build.OpenPCDet()
    given = mine.read(config_file)
    made = mine.quantized_config(given, RECIPE)
    names = {k: v.NAME for k, v in made.MODEL.items() if isinstance(v, dict) and 'NAME' in v}
    assert made.MODEL.NAME == 'QuantCenterPoint' and 'QUANT' not in given.MODEL
    assert {k for k, v in names.items() if v.startswith('Quant')} == {
        'BACKBONE_3D',
        'BACKBONE_2D',
        'DENSE_HEAD',
    }
    assert mine.recipe_of(made, config_file) == Recipe.from_dict(RECIPE)
    assert mine.float_config(made).MODEL == given.MODEL
    with pytest.raises(Q3DError, match='no MODEL.QUANT'):
        mine.recipe_of(given, config_file)


def test_both_models_of_the_same_weights_compute_the_same(build, config_file, frame):
    mine = build.OpenPCDet()
    given = mine.read(config_file)
    reference = randomize(mine.build(given))
    assert not reference.training and not any(isinstance(m, QuantUnit) for m in reference.modules())
    model = mine.build(mine.quantized_config(given, RECIPE))
    mine.load(model, reference.state_dict())
    lifecycle.set_enabled(model, False)
    batch = mine.prepare(reference, frame)
    assert mine.voxels(batch) == 60
    keys = set(batch)
    with torch.no_grad():
        # The quantized one has no ranges yet, and does not calibrate by itself.
        expected, got = (mine.run(net, batch)[0] for net in (reference, model))
    assert set(batch) == keys
    for a, b in zip(expected, got):
        assert all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-5) for k in a)


def test_changes_of_the_config(build, config_file, tmp_path):
    mine = build.OpenPCDet()
    cfg = mine.read(config_file, {'DATA_CONFIG.DATA_PATH': str(tmp_path / 'other')})
    assert str(tmp_path / 'other') == cfg.DATA_CONFIG.DATA_PATH
    with pytest.raises(Q3DError, match='no such key'):
        mine.read(config_file, {'DATA_CONFIG.DATA_PAHT': 'x'})


def test_configs_of_no_folder(build, tmp_path):
    mine = build.OpenPCDet()
    mine.folder = tmp_path / 'none' / 'cfgs'
    with pytest.raises(Q3DError, match='has no cfgs'):
        mine.configs()
