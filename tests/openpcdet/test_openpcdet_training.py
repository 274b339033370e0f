"""Quantization-aware training of a detector of the contract double, in the order of OpenPCDet's script."""

import copy
import json

import numpy as np
import pytest
import torch
from torch.optim import optimizer as torch_optimizer
from train_double import OptimWrapper, build_optimizer, result_of, training_state

from q3d_plugin import lifecycle, safe_load
from q3d_plugin.errors import Q3DError

RECIPE = {'TARGET': 'simulation', 'ACTIVATION': {'CALIBRATOR': 'max'}, 'CALIBRATION': {'FRAMES': 2}}
QAT = {**RECIPE, 'MODE': 'qat'}
KINDS = {
    'log2': {'WEIGHT': 'learned', 'ACTIVATION': 'learned', 'SCALE': 'log2'},
    'linear': {'WEIGHT': 'learned', 'ACTIVATION': 'learned', 'SCALE': 'linear', 'LR_FACTOR': 1.0},
    'fixed': {'WEIGHT': 'fixed', 'ACTIVATION': 'fixed'},
    'moving': {'WEIGHT': 'moving', 'ACTIVATION': 'moving'},
}


def qat(kind='log2', **schedule):
    return {**QAT, 'TRAINING': {'RANGES': KINDS[kind], 'SCHEDULE': schedule}}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def learned(model):
    return [q.range_parameter for q in lifecycle.quantizers(model) if q.range_parameter is not None]


def groups_of(optimizer):
    return getattr(optimizer, 'opt', optimizer).param_groups


def range_group(optimizer):
    return next((g for g in groups_of(optimizer) if any(k.startswith('q3d_') for k in g)), None)


@pytest.fixture
def step(adapter, batch):
    """Makes training steps: ``step(model, optimizer, number)``."""

    def run(model, optimizer, number=1):
        function = adapter.pcdet_models.model_fn_decorator()
        for index in range(number):
            model.train()
            optimizer.zero_grad()
            function(model, batch(model, index)).loss.backward()
            optimizer.step()

    return run


@pytest.fixture
def started(make, float_file, run_logger):
    """A detector and an optimizer before the first step, as the script has them."""

    def build(quant=None, kind='adam_onecycle', path=float_file):
        model = make(quant or qat(), training=True)
        optimizer = build_optimizer(model, kind)
        if isinstance(optimizer, OptimWrapper):
            optimizer.lr = 1e-3
        model.load_params_from_file(filename=str(path), logger=run_logger)
        return model.train(), optimizer

    return build


@pytest.fixture
def saved(tmp_path):
    """Saves a training as the script does: ``saved(model, optimizer)`` gives the file."""

    def save(model, optimizer, epoch=1, it=2):
        path = tmp_path / f'checkpoint_epoch_{epoch}.pth'
        state = {**training_state(model, optimizer, epoch, it), 'lr': np.float64(1e-3)}
        torch.save(state, path, _use_new_zipfile_serialization=False)
        return path

    return save


@pytest.fixture
def resumed(make, run_logger):
    """A detector and an optimizer that go on from a file, as the script has them."""

    def build(path, quant=None, kind='adam_onecycle'):
        model = make(quant or qat(), training=True)
        optimizer = build_optimizer(model, kind)
        model.load_params_with_optimizer(str(path), optimizer=optimizer, logger=run_logger)
        return model.train(), optimizer

    return build


@pytest.mark.parametrize('kind', ['log2', 'linear'])
def test_ranges_are_parameters_of_model_and_optimizer_before_the_first_step(started, kind):
    model, optimizer = started(qat(kind))
    names = [n for n, _ in model.named_parameters() if '_quantizer' in n]
    assert len(names) == len(learned(model)) > 60
    assert all(n.endswith('_log2_amax' if kind == 'log2' else '._amax') for n in names)
    weights, norms, ranges = groups_of(optimizer)
    assert [id(p) for p in ranges['params']] == [id(p) for p in learned(model)]
    assert not norms['params'] and not {map(id, weights['params'])} & {map(id, ranges['params'])}
    # train() in every iteration changes nothing.
    before = learned(model)
    assert all(a is b for a, b in zip(before, learned(model.train())))


@pytest.mark.parametrize('kind', ['log2', 'linear', 'fixed', 'moving'])
def test_training_resuming_and_testing_its_checkpoints(
    make, outputs, started, step, saved, resumed, run_logger, tmp_path, kind
):
    model, optimizer = started(qat(kind))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ranges = {n: v.clone() for n, v in model.state_dict().items() if n.endswith('._amax')}
    step(model, optimizer, 2)
    assert all(m.training for m in model.modules() if not list(m.children()))
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if '_quantizer' not in n)
    moved = [n for n, v in model.state_dict().items() if n in ranges and not torch.equal(v, ranges[n])]
    assert len(moved) > 0.4 * len(ranges)
    path = saved(model, optimizer)
    assert safe_load.load(str(path))['it'] == 2

    again, other = resumed(path, qat(kind))
    assert same(result_of(again), result_of(model)) and int(again.global_step) == 2
    assert len(groups_of(other)) == len(groups_of(optimizer))
    states = other.state_dict()['state'], optimizer.state_dict()['state']
    assert len(states[0]) == len(list(again.parameters()))
    for a, b in zip(*(s.values() for s in states)):
        assert torch.equal(a['exp_avg'], b['exp_avg'])
    if kind != 'moving':
        # What the last batch before a checkpoint adds to a moving average is not in the checkpoint.
        step(again, other), step(model, optimizer)
        assert same(result_of(again), result_of(model))

    tested = make(RECIPE)
    tested.load_params_from_file(str(path), run_logger)
    content, state = torch.load(path, weights_only=True)['model_state'], tested.state_dict()
    assert all(torch.equal(content[n], state[n]) for n in ranges)
    outputs(tested)
    assert (tmp_path / 'run' / 'log_eval.txt').read_text().count('calibrating on') == 1


def test_checkpoints_are_evaluated_in_the_model_that_was_trained(
    make, outputs, started, step, saved, run_logger
):
    for kind in KINDS:
        model, optimizer = started(qat(kind))
        paths = []
        for epoch in (1, 2):
            step(model, optimizer, 2)
            paths.append(saved(model, optimizer, epoch))
        for path in paths:
            alone = make(qat(kind), training=True)
            alone.load_params_from_file(str(path), run_logger)
            expected = outputs(alone)
            model.load_params_from_file(str(path), run_logger)
            assert same(outputs(model), expected), kind
            model.state_dict()
            assert same(outputs(model), expected), kind
        assert not learned(model)


def test_a_model_may_be_trained_again_from_another_checkpoint(started, step, float_file, run_logger):
    model, optimizer = started()
    step(model, optimizer, 2)
    model.load_params_from_file(str(float_file), run_logger)
    model.train()
    assert int(model.q3d_steps) == 0
    assert [id(p) for p in groups_of(optimizer)[2]['params']] == [id(p) for p in learned(model)]
    before = [p.detach().clone() for p in learned(model)]
    step(model, optimizer)
    assert any(not torch.equal(a, b) for a, b in zip(before, learned(model)))


def test_an_optimizer_that_is_made_later_is_recognised_at_its_first_step(
    make, batch, float_file, run_logger, step
):
    hooks = len(torch_optimizer._global_optimizer_pre_hooks)
    model = make(qat(), training=True)
    model.load_params_from_file(str(float_file), run_logger)
    # Two that could be the one: nobody can tell before a step.
    early = [build_optimizer(model, 'sgd') for _ in range(2)]
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, weight_decay=0.1)
    assert not any(map(range_group, early))
    stranger = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    stranger.step()
    assert range_group(stranger) is None is range_group(optimizer)
    assert len(torch_optimizer._global_optimizer_pre_hooks) == hooks + 1
    step(model, optimizer, 2)
    assert len(torch_optimizer._global_optimizer_pre_hooks) == hooks and not any(map(range_group, early))
    weights, ranges = optimizer.param_groups
    assert len(ranges['params']) == len(learned(model))
    assert not {map(id, weights['params'])} & {map(id, ranges['params'])}
    assert ranges['weight_decay'] == 0 and ranges['lr'] == pytest.approx(1e-2)


def test_weight_decay_of_the_wrapper_leaves_ranges_alone(started, batch, adapter):
    model, optimizer = started()
    optimizer.wd = 0.5
    for _ in range(2):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        adapter.pcdet_models.model_fn_decorator()(model, batch(model))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.lr = 0.1
        optimizer.step()
        for name, parameter in model.named_parameters():
            factor = 1.0 if '_quantizer' in name else 1 - 0.5 * 0.1
            torch.testing.assert_close(parameter, before[name] * factor, rtol=1e-6, atol=0)


def test_the_learning_rate_of_ranges_follows_the_script(started, step):
    model, optimizer = started()
    for lr in (1e-3, 5e-4):
        optimizer.lr = lr
        step(model, optimizer)
        assert [g['lr'] for g in groups_of(optimizer)] == pytest.approx([lr, lr, 10 * lr])


@pytest.mark.skipif(not hasattr(torch.amp, 'GradScaler'), reason='torch < 2.3 scales on CUDA alone')
def test_gradients_of_ranges_are_unscaled_and_clipped_in_the_first_step(started, adapter, batch):
    """As the script does it with --use_amp."""
    found = []
    for scale in (1.0, 2.0**16):
        model, optimizer = started(kind='sgd')
        scaler = torch.amp.GradScaler('cpu', init_scale=scale)
        loss = adapter.pcdet_models.model_fn_decorator()(model, batch(model)).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        found.append([p.grad.clone() for p in model.parameters()])
    for plain, scaled in zip(*found):
        torch.testing.assert_close(plain, scaled, rtol=1e-5, atol=1e-12)


def positions(model, record):
    """Has the positions in epochs written down that the schedule of a model is asked for."""
    session = model._q3d_training.session
    plain = session.before_step
    session.before_step = lambda epoch: (record.append(epoch), plain(epoch))


def test_the_position_in_epochs_goes_on_where_a_training_is_resumed(
    toy_set, started, step, adapter, saved, resumed, make, float_file, run_logger
):
    infos = [{'token': f'train{s}', 'seed': s} for s in range(5)]
    (toy_set / 'v1.0-mini' / 'train.json').write_text(json.dumps(infos))
    function, found = adapter.pcdet_models.model_fn_decorator(), []

    def epoch(model, optimizer):
        # Three iterations, of which the last has one frame.
        for frames in ((0, 1), (2, 3), (4,)):
            batch = model.dataset.collate_batch([model.dataset[i] for i in frames])
            function(model.train(), batch).loss.backward()
            optimizer.step()

    model, optimizer = started()
    positions(model, found)
    epoch(model, optimizer)
    path = saved(model, optimizer, it=3)
    assert found == pytest.approx([0, 1 / 3, 2 / 3]) and int(model.q3d_steps) == 3

    model, optimizer = resumed(path)
    positions(model, found)
    epoch(model, optimizer)
    assert found[3:] == pytest.approx([1, 4 / 3, 5 / 3])

    # A training that starts from this checkpoint is another one.
    model, optimizer = started(path=path)
    positions(model, found)
    step(model, optimizer)
    assert found[6:] == [0]

    # Older checkpoints have OpenPCDet's count alone.
    content = torch.load(path, weights_only=True)
    del content['model_state']['q3d_steps']
    torch.save(content, path)
    model, _ = resumed(path)
    assert int(model.q3d_steps) == 3


def test_iterations_of_an_epoch_are_counted_as_the_script_does(adapter, make):
    from q3d_plugin.openpcdet.training import iterations_per_epoch

    dataset = make(training=True).dataset
    dataset.infos = dataset.infos * 4
    assert [iterations_per_epoch(dataset, size) for size in (1, 5, 12, 20)] == [12, 3, 1, 1]
    # --merge_all_iters_to_one_epoch: the data set says that it is as long as all epochs.
    dataset._merge_all_iters_to_one_epoch, dataset.total_epochs = True, 4
    assert iterations_per_epoch(dataset, 1) == 3


def test_the_schedule_is_kept(started, step):
    """Three iterations an epoch: activations float in the first, ranges learned in the second alone."""
    model, optimizer = started(qat(ACTIVATIONS_FROM=1.0, LEARN_UNTIL=2.0))
    activations = [q for q in lifecycle.quantizers(model) if not q.per_channel]
    waiting, moved = [], []
    for _ in range(9):
        before = [p.detach().clone() for p in learned(model)]
        step(model, optimizer)
        waiting.append({q.waiting for q in activations})
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, learned(model))))
    assert waiting == [{True}] * 3 + [{False}] * 6
    assert moved[1:] == [True] * 5 + [False] * 3


def test_a_copy_of_a_model_is_not_in_training(started):
    model, optimizer = started()
    other = copy.deepcopy(model)
    assert other._q3d_training is None and len(groups_of(optimizer)) == 3
    assert same(result_of(other), result_of(model))


@pytest.mark.parametrize(
    ('quant', 'words'),
    [
        (
            {**qat('linear'), 'SKIP': ['backbone_3d']},
            [
                "MODEL.QUANT.TRAINING.RANGES.SCALE: 'log2' and 'linear'",
                'MODEL.QUANT.TRAINING.RANGES.LR_FACTOR: 10.0 and 1.0',
                "MODEL.QUANT.SKIP: [] and ['backbone_3d']",
                'resume with another recipe',
                'start a new training',
            ],
        ),
        (qat(LEARN_UNTIL=3.0), ['TRAINING.SCHEDULE.LEARN_UNTIL: None and 3.0']),
        ({**qat(), 'WEIGHT': {'BITS': 4}}, ['quantized with another recipe', 'QUANT.WEIGHT.BITS: 8 and 4']),
    ],
    ids=['several', 'schedule', 'plans'],
)
def test_a_training_does_not_resume_with_another_recipe(
    started, step, saved, make, resumed, batch, run_logger, quant, words
):
    model, optimizer = started()
    step(model, optimizer)
    path = saved(model, optimizer)
    with pytest.raises(Q3DError) as caught:
        resumed(path, quant)
    assert all(word in str(caught.value) for word in ['checkpoint_epoch_1.pth', *words])
    assert 'CALIBRATION' not in str(caught.value)

    # tools/train.py goes on from what --pretrained_model named, whatever the error: not so.
    quantized = run_logger.handlers[0].baseFilename.replace('log_eval.txt', 'quantized.pth')
    for start in (quantized, None):
        model = make({**quant, 'SKIP': [], 'WEIGHT': {'BITS': 8}}, training=True)
        if start:
            model.load_params_from_file(start, run_logger)
        model.quant_recipe = make(quant).quant_recipe
        with pytest.raises(Q3DError):
            model.load_params_with_optimizer(str(path), logger=run_logger)
        model.train()
        with pytest.raises(Q3DError, match=r'no checkpoint to quantize.*one was refused.*epoch_1\.pth'):
            model(batch(model))


def test_the_state_of_another_optimizer_is_an_error(started, step, saved, resumed):
    model, optimizer = started()
    step(model, optimizer)
    path = saved(model, optimizer)
    with pytest.raises(ValueError, match='parameter group'):
        resumed(path, kind='sgd')


def test_training_wants_mode_qat_and_a_float_checkpoint(
    make, started, step, outputs, batch, float_file, run_logger, tmp_path
):
    model = make(RECIPE, training=True)
    model.load_params_from_file(str(float_file), run_logger)
    with pytest.raises(Q3DError, match=r"MODEL\.QUANT\.MODE: 'ptq' does not train; 'qat' would work"):
        model.train()(batch(model))
    model = make(QAT, training=True).train()
    with pytest.raises(Q3DError, match='no checkpoint to quantize.*--pretrained_model'):
        model(batch(model))
    with pytest.raises(Q3DError, match='cannot resume from a float checkpoint.*--pretrained_model'):
        model.load_params_with_optimizer(str(float_file), logger=run_logger)
    # A quantized checkpoint is a start, but nothing to resume from.
    model = make(RECIPE)
    model.load_params_from_file(str(float_file), run_logger)
    outputs(model)
    quantized = tmp_path / 'run' / 'quantized.pth'
    model, optimizer = started(path=quantized)
    step(model, optimizer)
    with pytest.raises(Q3DError, match=r"resume with another recipe.*MODE: 'ptq' and 'qat'"):
        make(QAT).load_params_with_optimizer(str(quantized), logger=run_logger)


def test_without_train_before_it_the_first_forward_pass_prepares_a_model(make, step, float_file, run_logger):
    model = make(qat(), training=True).train()
    optimizer = build_optimizer(model, 'sgd')
    model.load_params_from_file(str(float_file), run_logger)
    assert not learned(model)
    step(model, optimizer)
    assert learned(model) and range_group(optimizer) is not None
