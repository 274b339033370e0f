"""Distillation in OpenPCDet: losses beside the detector's own, and a teacher that is no part of it."""

import copy
import os

import pytest
import torch

from q3d_plugin import lifecycle
from q3d_plugin.errors import Q3DError
from q3d_plugin.openpcdet.checkpoints import unpack_recipe
from q3d_plugin.training.distillation import box_loss, feature_loss, heatmap_loss

WEIGHTS = {'HEATMAP': 2.0, 'BOXES': 0.5, 'FEATURES': 3.0}


def qat(**distillation):
    return {
        'MODE': 'qat',
        'TARGET': 'simulation',
        'WEIGHT': {'BITS': 4},
        'ACTIVATION': {'BITS': 4, 'CALIBRATOR': 'max'},
        'CALIBRATION': {'FRAMES': 2},
        'TRAINING': {'DISTILLATION': distillation},
    }


@pytest.fixture
def started(make, float_file, run_logger):
    """A detector before its first step: ``started(recipe)``."""

    def build(quant):
        model = make(quant, training=True)
        model.load_params_from_file(filename=str(float_file), logger=run_logger)
        return model.train()

    return build


def heads_outputs(model, batch):
    """Features that the head reads, and its outputs for each task."""
    for module in model.module_list:
        if module is model.dense_head:
            features = batch['spatial_features_2d']
        batch = module(batch)
    tasks = [
        {k: v.detach() for k, v in task.items()} for task in model.dense_head.forward_ret_dict['pred_dicts']
    ]
    return features.detach(), tasks


def test_the_losses_are_those_towards_the_float_model(started, batch):
    model = started(qat(**WEIGHTS))
    names = set(model.state_dict())
    student = copy.deepcopy(model)
    teacher = copy.deepcopy(model)
    lifecycle.set_enabled(teacher, False)
    returned, shown, _ = model(batch(model))
    plain = started({**qat(), 'TRAINING': {}})
    own = plain(batch(plain))[0]['loss']
    outputs = []
    for each in (student, teacher):
        with torch.no_grad():
            outputs.append(heads_outputs(each.train(), batch(each)))
    (features, mine), (expected, other) = outputs
    losses = {
        'heatmap': 2 * sum(heatmap_loss(a['hm'], b['hm']) for a, b in zip(mine, other)),
        'boxes': 0.5
        * sum(
            box_loss(*({k: v for k, v in t.items() if k != 'hm'} for t in (a, b)), b['hm'])
            for a, b in zip(mine, other)
        ),
        'features': 3 * feature_loss([features], [expected]),
    }
    for name, value in losses.items():
        assert value > 0 and shown[f'loss_distill_{name}'] == pytest.approx(value.item(), rel=1e-3), name
    total = own + sum(losses.values())
    assert returned['loss'].item() == pytest.approx(total.item(), rel=1e-3)
    returned['loss'].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert set(model.state_dict()) == names and not any('teacher' in n for n in names)


def test_a_resume_takes_the_teacher_of_the_start(started, make, batch, tmp_path, run_logger):
    model = started(qat(FEATURES=1.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(batch(model))[0]['loss'].backward()
        optimizer.step()
    path = tmp_path / 'checkpoint_epoch_1.pth'
    state = model.state_dict()
    torch.save({'model_state': state, 'epoch': 1, 'it': 2, 'optimizer_state': optimizer.state_dict()}, path)
    teacher = unpack_recipe(state['q3d_recipe'])['q3d']['teacher']
    first = model._q3d_training._distillation.teacher
    again = make(qat(FEATURES=1.0), training=True)
    other = torch.optim.SGD(again.parameters(), lr=0.05)
    again.load_params_with_optimizer(str(path), optimizer=other, logger=run_logger)
    second = again._q3d_training._distillation.teacher
    weights = {n: p for n, p in first.named_parameters() if '_quantizer' not in n}
    for name, value in second.named_parameters():
        if '_quantizer' not in name:
            assert torch.equal(value, weights[name]), name
    assert second.dataset is again.dataset and not second.training
    assert not any(q.enabled for q in lifecycle.quantizers(second))
    os.remove(teacher)
    with pytest.raises(Q3DError, match='quantized.pth'):
        make(qat(FEATURES=1.0), training=True).load_params_with_optimizer(str(path), logger=run_logger)


def test_a_teacher_of_another_architecture_is_refused(make, started, tmp_path, float_file):
    state = torch.load(float_file, weights_only=False)
    name = next(n for n in state['model_state'] if n.startswith('dense_head') and n.endswith('weight'))
    state['model_state'][name] = torch.zeros(1, 2, 3, 3)
    path = tmp_path / 'other.pth'
    torch.save(state, path)
    with pytest.raises(Q3DError, match='of another model'):
        started(qat(TEACHER=str(path)))


def test_a_copy_of_the_detector_has_no_teacher(started):
    model = started(qat())
    assert model._q3d_training is not None and copy.deepcopy(model)._q3d_training is None
