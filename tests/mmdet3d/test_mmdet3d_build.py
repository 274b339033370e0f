"""The adapter of MMDetection3D: Quant types put into a config and taken out, models built of both, frames."""

import numpy as np
import pytest
import torch

from q3d_plugin import lifecycle
from q3d_plugin.errors import Q3DError
from q3d_plugin.layers import QuantUnit
from q3d_plugin.mmdet3d.build import MMDet3D
from q3d_plugin.mmdet3d.quant_types import put_quant_types, take_quant_types
from q3d_plugin.recipe import Recipe

FLOAT, QUANT = ('configs/mmdet3d/toy_centerpoint_voxel.py', 'configs/mmdet3d/toy_centerpoint_voxel_w8a8.py')
RECIPE = {'target': 'simulation', 'weight': {'bits': 6}}


@pytest.fixture(scope='module')
def adapter():
    return MMDet3D()


def test_quant_types_inside_of_another_scope_name_theirs():
    node = {
        'backbone': {'type': 'SECOND'},
        'img': {'type': 'mmdet.ResNet'},
        'rpn': {'type': 'RPNHead', '_scope_': 'mmdet', 'inner': {'type': 'Unknown'}},
        'heads': [{'type': 'CenterHead'}],
        'float': {'type': 'HardSimpleVFE'},
    }
    assert put_quant_types(node) == 4
    assert node['backbone']['type'] == 'QuantSECOND' and node['img']['type'] == 'QuantResNet'
    assert node['rpn']['type'] == 'mmdet3d.QuantRPNHead' and node['rpn']['inner']['type'] == 'Unknown'
    assert node['heads'][0]['type'] == 'QuantCenterHead' and node['float']['type'] == 'HardSimpleVFE'


def test_quant_types_are_taken_out_again():
    node = {
        'backbone': {'type': 'QuantSECOND'},
        'img': {'type': 'QuantResNet'},
        'rpn': {'type': 'mmdet3d.QuantRPNHead', '_scope_': 'mmdet'},
        'heads': [{'type': 'mmdet3d.QuantCenterHead', '_scope_': 'mmdet'}],
        'strange': {'type': 'QuantNothing'},
    }
    assert take_quant_types(node) == 4
    # Types of mmdet keep the scope without which MMDetection3D's registry does not find them.
    assert node['img']['type'] == 'mmdet.ResNet' and node['rpn']['type'] == 'mmdet.RPNHead'
    assert node['backbone']['type'] == 'SECOND' and node['heads'][0]['type'] == 'mmdet3d.CenterHead'
    assert node['strange']['type'] == 'QuantNothing'


def test_the_float_config_of_a_quantized_one_builds_the_float_model(adapter):
    given, quantized = adapter.read(FLOAT), adapter.read(QUANT)
    before = quantized.model.to_dict()
    made = adapter.float_config(quantized)
    assert made.model.to_dict() == given.model.to_dict() and quantized.model.to_dict() == before
    model = adapter.build(made)
    assert not model.training and not any(isinstance(m, QuantUnit) for m in model.modules())
    with pytest.raises(Q3DError, match='no QuantHook'):
        adapter.recipe_of(made, 'made.py')


def test_the_quantized_config_of_a_float_one_has_types_and_recipe(adapter):
    given, quantized = adapter.read(FLOAT), adapter.read(QUANT)
    made = adapter.quantized_config(given, RECIPE)
    # Bases of the wheel say _scope_='mmdet3d', so that the full name is the same type.
    assert str(made.model.to_dict()).replace('mmdet3d.Quant', 'Quant') == str(quantized.model.to_dict())
    assert adapter.recipe_of(made, 'made.py') == Recipe.from_dict(RECIPE)
    assert 'custom_hooks' not in given or not given.custom_hooks


def test_both_models_of_the_same_weights_have_the_same_raw_outputs(adapter):
    quantized = adapter.read(QUANT)
    reference = adapter.build(adapter.float_config(quantized))
    model = adapter.build(quantized)
    lifecycle.configure(model, adapter.recipe_of(quantized, QUANT))
    lifecycle.set_enabled(model, False)
    adapter.load(model, reference.state_dict())
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(0, 10, (2000, 2)), rng.normal(-1, 0.5, (2000, 3))], 1)
    batch = adapter.points_batch(reference, points.astype(np.float32))
    assert 0 < adapter.voxels(batch) <= 2000
    names = set(batch['inputs']), set(batch['inputs']['voxels'])
    with torch.no_grad():
        expected, got = (adapter.forward_of(net)(batch) for net in (reference, model))
    assert set(expected) == set(got) and '0.0.heatmap' in expected
    for key, value in expected.items():
        assert torch.allclose(value, got[key], rtol=1e-3, atol=1e-4), key
    # The batch can be given again.
    assert names == (set(batch['inputs']), set(batch['inputs']['voxels']))


def test_weights_of_another_model_are_refused(adapter):
    model = adapter.build(adapter.read(FLOAT))
    with pytest.raises(Q3DError, match='of another model'):
        adapter.load(model, {'x': torch.zeros(1)})


def test_configs_of_no_folder(tmp_path):
    with pytest.raises(Q3DError, match='is not a folder'):
        MMDet3D(str(tmp_path / 'none')).configs()


def test_the_reason_of_an_unreadable_config_is_its_cause(adapter, tmp_path):
    (tmp_path / 'c.py').write_text('_base_ = ["./none.py"]\n')
    with pytest.raises(Q3DError, match='cannot be read') as caught:
        adapter.read(tmp_path / 'c.py')
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_the_loss_is_that_of_an_annotated_frame_of_the_data_set(adapter, toy_root):
    cfg = adapter.read(FLOAT)
    model = adapter.build(cfg).train()
    batch = adapter.training_batch(cfg, model, toy_root)
    assert len(batch['data_samples']) == 1 and len(batch['data_samples'][0].gt_instances_3d) > 0
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)):
        norm.momentum = 0.0
    found = []
    for _ in range(2):
        model.zero_grad()
        loss = adapter.loss(model, batch)
        loss.backward()
        found.append((loss.detach(), model.pts_bbox_head.shared_conv.conv.weight.grad))
    assert found[0][0] > 0 and found[0][1].isfinite().all() and found[0][1].any()
    # It can be given again.
    assert found[0][0] == pytest.approx(found[1][0].item(), rel=1e-4)
