"""The life of a quantized model: configure, check and load a checkpoint, calibrate, save, report."""

import copy
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from q3d_plugin import checkpoints, lifecycle
from q3d_plugin.checkpoint_file import check_checkpoint_file
from q3d_plugin.coverage import coverage, coverage_table
from q3d_plugin.cpu import enable_cpu_mode
from q3d_plugin.errors import Q3DError
from q3d_plugin.layers import QuantAdd, QuantConcat
from q3d_plugin.layers.model import quantizable_types
from q3d_plugin.quantizer import Mode
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import quantize_, share_input

ROOT = Path(__file__).resolve().parents[1]

enable_cpu_mode()


class Net(nn.Module):
    """A quantized backbone with an addition and a concatenation, and a float head."""

    def __init__(self, quantized=True, width=6):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
        )
        self.left = nn.Conv2d(width, 4, 1)
        self.right = nn.Conv2d(width, 4, 1)
        self.idle = nn.Conv2d(width, 4, 1)
        self.head = nn.Linear(8, 2)
        self.add, self.concat = (QuantAdd(), QuantConcat()) if quantized else (torch.add, torch.cat)
        if quantized:
            for part in (self.backbone, self.left, self.right, self.idle):
                quantize_(part)
            share_input([self.left, self.right])

    def forward(self, x):
        x = self.backbone(x)
        left, right = self.left(x), self.right(x)
        x = self.concat([self.add(left, right), right], 1)
        return self.head(x.mean((2, 3)))


def float_net():
    """A float model with statistics in its BatchNorm, in eval mode."""
    model = Net(quantized=False).eval()
    model.backbone[1].running_mean.normal_()
    model.backbone[1].running_var.uniform_(0.2, 3)
    return model


def configured(recipe=None):
    model = Net().eval()
    lifecycle.configure(model, Recipe.from_dict({'target': 'simulation', **(recipe or {})}))
    return model


def batches(count=3):
    return [torch.randn(2, 3, 8, 8) * (i + 1) for i in range(count)]


def calibrated(recipe=None, float_model=None):
    model = configured(recipe)
    model.load_state_dict((float_model or float_net()).state_dict())
    lifecycle.calibrate(model, batches(), model)
    return model


# Configuring.


def test_a_model_without_quant_types_is_refused_and_says_what_to_write():
    with pytest.raises(Q3DError) as caught:
        lifecycle.configure(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()), Recipe())
    message = str(caught.value)
    assert message.startswith('recipe: ') and 'nothing in the model has a Quant type' in message
    assert 'Conv2d, ReLU' in message and "'QuantSECOND'" in message


def test_a_pattern_for_no_layer_is_refused_before_anything_changes():
    model = Net()
    before = lifecycle.quantizers(model)
    with pytest.raises(Q3DError, match=r"recipe\.skip\[0\]: 'bakcbone' matches none .*'backbone"):
        lifecycle.configure(model, Recipe.from_dict(dict(target='simulation', skip=['bakcbone'])))
    after = lifecycle.quantizers(model)
    assert len(after) == len(before) and all(a is b for a, b in zip(after, before))


def test_configuring_leaves_parameters_alone():
    model = Net()
    before = {k: v.clone() for k, v in model.named_parameters()}
    lifecycle.configure(
        model, Recipe.from_dict(dict(target='simulation', weight=dict(bits=4), skip=['left']))
    )
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(torch.equal(after[k], v) for k, v in before.items())


def test_units_and_quantizers_are_listed_once_in_the_order_of_the_model():
    model = configured()
    names = [name for name, _ in lifecycle.units(model)]
    assert names == ['backbone.0', 'backbone.3', 'left', 'right', 'idle', 'add', 'concat']
    quantizers = lifecycle.quantizers(model)
    assert len(quantizers) == len({id(q) for q in quantizers}) == 5 * 2 + 2 - 1


def test_mode_float_computes_what_the_float_model_computes():
    source, model = float_net(), configured(dict(mode='float'))
    model.load_state_dict(source.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(model(x), source(x), rtol=1e-4, atol=1e-5)


def test_switching_quantizers_off_gives_the_float_model_and_on_the_quantized_one():
    source = float_net()
    model = calibrated(float_model=source)
    x = torch.randn(2, 3, 8, 8)
    quantized, expected = model(x), source(x)
    assert not torch.allclose(quantized, expected, rtol=1e-4, atol=1e-5)
    lifecycle.set_enabled(model, False)
    assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)
    lifecycle.set_enabled(model, True)
    assert torch.equal(model(x), quantized)


# Calibration.


def test_an_uncalibrated_model_does_not_run():
    model = configured()
    assert not lifecycle.is_calibrated(model)
    with pytest.raises(Q3DError, match=r'backbone\.0\.input_quantizer has no range'):
        model(torch.randn(1, 3, 8, 8))


def test_statistics_are_those_of_the_float_model():
    source, data = float_net(), batches()
    inputs = {}

    def watch(name):
        return lambda module, args: inputs.setdefault(name, []).append(args[0])

    for name in ('backbone.0', 'backbone.3', 'left'):
        source.get_submodule(name).register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for x in data:
            source(x)
    # Two bits: quantized weights would change every statistic behind them.
    model = configured(dict(weight=dict(bits=2), activation=dict(bits=4, calibrator='max')))
    model.load_state_dict(source.state_dict())
    assert lifecycle.calibrate(model, data, model) == 3
    for name, tensors in inputs.items():
        expected = float(torch.cat(tensors).abs().max())
        assert model.get_submodule(name).input_quantizer._amax.item() == pytest.approx(expected, rel=1e-5)
    folded = model.backbone[0].weight.detach()
    assert torch.equal(model.backbone[0].weight_quantizer._amax, folded.flatten(1).abs().amax(1))


def test_after_calibration_everything_is_on_and_calibrated():
    model = calibrated()
    assert lifecycle.is_calibrated(model)
    assert not any(q._disabled or q.observing for q in lifecycle.quantizers(model))
    assert model.backbone[0].input_quantizer.mode is Mode.SIGNED
    assert model.backbone[3].input_quantizer.mode is Mode.UNSIGNED
    assert model.left.input_quantizer is model.right.input_quantizer
    assert model.left.input_quantizer.mode is Mode.UNSIGNED


def test_a_layer_that_saw_nothing_stays_float_and_is_named_once(caplog):
    with caplog.at_level(logging.WARNING):
        model = calibrated()
    records = [r for r in caplog.records if 'saw no data' in r.getMessage()]
    assert len(records) == 1
    assert records[0].getMessage().startswith('1 layers saw no data') and 'idle' in records[0].getMessage()
    assert model.idle.float_reason == 'saw no data during calibration'
    x = torch.randn(1, 6, 2, 2)
    assert torch.equal(model.idle(x), nn.functional.conv2d(x, model.idle.weight, model.idle.bias))
    assert model.left.float_reason == ''


def test_the_warning_goes_to_the_given_logger(caplog):
    model = configured()
    logger = logging.getLogger('mine')
    with caplog.at_level(logging.WARNING):
        lifecycle.calibrate(model, batches(), model, logger=logger)
    assert [r.name for r in caplog.records] == ['mine']


def test_no_batches_are_an_error_and_no_range():
    model = configured()
    with pytest.raises(Q3DError, match='not one frame'):
        lifecycle.calibrate(model, [], model)
    assert not lifecycle.is_calibrated(model)


def test_nan_is_an_error_that_names_layer_and_frame_and_leaves_no_range():
    model, data = configured(), batches()
    data[1][0, 0, 0, 0] = float('nan')
    with pytest.raises(Q3DError, match=r"input of 'backbone\.0'.* in frame scene_7"):
        lifecycle.calibrate(model, data, model, names=lambda b: 'scene_7')
    assert not lifecycle.is_calibrated(model)
    assert not any(q._disabled for q in lifecycle.quantizers(model))


def test_calibrating_again_replaces_every_range():
    model = calibrated(dict(activation=dict(calibrator='max')))
    data = [torch.full((1, 3, 8, 8), 50.0)]
    lifecycle.calibrate(model, data, model)
    assert model.backbone[0].input_quantizer._amax == 50
    assert model.backbone[0].input_quantizer.mode is Mode.UNSIGNED


def test_quantization_is_better_with_more_bits():
    source = float_net()
    x = torch.randn(4, 3, 8, 8)
    errors = []
    for bits in (3, 5, 8, 12):
        spec = dict(bits=bits)
        model = configured(dict(weight=spec, activation=spec))
        model.load_state_dict(source.state_dict())
        lifecycle.calibrate(model, [x], model)
        errors.append(float((model(x) - source(x)).square().mean()))
    assert errors[0] > 4 * errors[1] > 16 * errors[2] > 64 * errors[3]


# Checkpoints that do not belong.


def test_a_float_checkpoint_passes_and_is_not_changed():
    state = float_net().state_dict()
    before = {k: v.clone() for k, v in state.items()}
    folded = checkpoints.check_state_dict(configured(), state)
    assert list(state) == list(before) and all(torch.equal(state[k], v) for k, v in before.items())
    assert 'backbone.0.bias' in folded and not any(k.startswith('backbone.1.') for k in folded)
    assert not checkpoints.is_quantized_checkpoint(state)


def test_missing_keys_are_named_with_a_count_and_a_near_match():
    state = {k.replace('backbone', 'backbones'): v for k, v in float_net().state_dict().items()}
    with pytest.raises(Q3DError) as caught:
        checkpoints.check_state_dict(configured(), state, "checkpoint 'a.pth'")
    message = str(caught.value)
    assert message.startswith("checkpoint 'a.pth': of another model: 'backbone.0.weight' is missing")
    assert 'and 3 more' in message and "did you mean 'backbones.0.weight'" in message


@pytest.mark.parametrize('gone', ['head.bias', 'backbone.0.weight', 'backbone.1.running_var', 'left.weight'])
def test_each_missing_key_is_noticed(gone):
    state = float_net().state_dict()
    del state[gone]
    with pytest.raises(Q3DError, match='of another model'):
        checkpoints.check_state_dict(configured(), state)


def test_a_checkpoint_with_nothing_in_it_is_of_another_model():
    with pytest.raises(Q3DError, match='it has 0 entries, 0 of the'):
        checkpoints.check_state_dict(configured(), {})


def test_other_shapes_are_named_with_both():
    state = float_net().state_dict()
    state['head.weight'] = torch.zeros(2, 9)
    with pytest.raises(Q3DError, match=r"'head\.weight' has the shape \(2, 9\), the model needs \(2, 8\)"):
        checkpoints.check_state_dict(configured(), state)


@pytest.mark.parametrize('width', [4, 12])
def test_a_model_of_another_width_is_of_another_model(width):
    with pytest.raises(Q3DError, match='of another model'):
        checkpoints.check_state_dict(configured(), Net(quantized=False, width=width).state_dict())


def test_a_sparse_model_with_other_input_channels_is_named_too():
    """Points with five features instead of four are the most common mistake of all."""
    spconv = pytest.importorskip('spconv.pytorch')

    def make(channels, size):
        layers = spconv.SubMConv3d(channels, 16, size, bias=False), nn.BatchNorm1d(16)
        return spconv.SparseSequential(*layers)

    for channels, size in ((5, 3), (4, 5), (5, 1)):
        model = quantize_(make(4, 1 if size == 1 else 3))
        with pytest.raises(Q3DError, match=r"of another model: '0\.weight' has the shape \(16,"):
            checkpoints.check_state_dict(model, make(channels, size).state_dict())
    old = make(5, 3).state_dict()
    old['0.weight'] = old['0.weight'].permute(1, 2, 3, 4, 0)
    with pytest.raises(Q3DError, match=r"'0\.weight' has the shape \(3, 3, 3, 5, 16\)"):
        checkpoints.check_state_dict(quantize_(make(4, 3)), old)


def test_a_quantized_checkpoint_passes_and_restores_the_model():
    source = calibrated()
    state = source.state_dict()
    assert checkpoints.is_quantized_checkpoint(state)
    target = configured()
    checkpoints.check_state_dict(target, state)
    target.load_state_dict(state)
    assert lifecycle.is_calibrated(target)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(target(x), source(x))


def test_quantizers_that_lack_and_that_are_too_many_are_named():
    whole, less = calibrated(), calibrated(dict(skip=['left']))
    with pytest.raises(Q3DError, match=r"'left\.input_quantizer\._amax' and 3 more have no range in it"):
        checkpoints.check_state_dict(configured(), less.state_dict())
    with pytest.raises(Q3DError, match=r"'left\.input_quantizer\._amax' and 3 more are not in the recipe"):
        checkpoints.check_state_dict(configured(dict(skip=['left'])), whole.state_dict())


# Checkpoint files; tests/test_checkpoint_file.py has those that are damaged.


def test_a_saved_checkpoint_loads_safely_and_describes_itself(tmp_path):
    recipe = Recipe.from_dict(
        dict(target='simulation', weight=dict(bits=4), overrides=[dict(layers='left', weight=None)])
    )
    model = calibrated(recipe.to_dict())
    path = tmp_path / 'quantized.pth'
    checkpoints.save_checkpoint(model, recipe, str(path), dict(dataset_meta=dict(classes=['car'])))
    assert os.listdir(tmp_path) == ['quantized.pth']
    check_checkpoint_file(str(path))
    loaded = torch.load(path, weights_only=True)
    assert loaded['meta']['dataset_meta'] == dict(classes=['car'])
    checkpoints.check_recipe_of(loaded['meta'], loaded['state_dict'], model, recipe)
    again = Recipe.from_dict(loaded['meta'][checkpoints.META_KEY]['recipe'])
    assert again == recipe
    target = configured(again.to_dict())
    checkpoints.check_state_dict(target, loaded['state_dict'])
    target.load_state_dict(loaded['state_dict'])
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(target(x), model(x))


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = calibrated()
    parameters = dict(model.named_parameters())
    checkpoints.save_checkpoint(model, Recipe(), str(tmp_path / 'a.pth'))
    assert all(v is parameters[k] and v.requires_grad for k, v in model.named_parameters())
    assert getattr(torch.load(tmp_path / 'a.pth', weights_only=True)['state_dict'], '_metadata', None)


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    model, path = calibrated(), tmp_path / 'quantized.pth'
    checkpoints.save_checkpoint(model, Recipe(), str(path))
    before = path.read_bytes()

    def full_disk(content, target):
        Path(target).write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full_disk)
    with pytest.raises(OSError, match='No space'):
        checkpoints.save_checkpoint(model, Recipe(), str(path))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['quantized.pth']


KILLED_WHILE_SAVING = """
import io, sys, time, torch
from q3d_plugin import checkpoints
from q3d_plugin.recipe import Recipe

model = torch.nn.Linear(300, 300)
path, first = sys.argv[1:]
if first == 'yes':
    checkpoints.save_checkpoint(model, Recipe(), path)

def slow_save(content, target):
    whole = io.BytesIO()
    save(content, whole)
    with open(target, 'wb') as f:
        f.write(whole.getvalue()[:200000])
        f.flush()
        print('half', flush=True)
        time.sleep(600)

save, torch.save = torch.save, slow_save
checkpoints.save_checkpoint(model, Recipe(), path)
"""


@pytest.mark.skipif(os.name != 'posix', reason='kill -9')
@pytest.mark.parametrize('first', ['no', 'yes'])
def test_a_process_killed_in_the_middle_of_a_save_leaves_no_half_file(tmp_path, first):
    path = tmp_path / 'quantized.pth'
    command = [sys.executable, '-c', textwrap.dedent(KILLED_WHILE_SAVING), str(path), first]
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline() == 'half\n'
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    # The kill came in the middle: half of the file is there, under another name.
    assert [p.stat().st_size for p in tmp_path.glob('*.tmp*')] == [200000]
    assert path.exists() == (first == 'yes')
    if first == 'yes':
        check_checkpoint_file(str(path))
        assert torch.load(path, weights_only=True)['state_dict']['weight'].shape == (300, 300)


# Coverage.


def row_of(rows, name):
    return next(r for r in rows if r.name == name)


def test_coverage_has_a_row_for_every_kind_of_layer():
    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)

    model = nn.Module()
    model.net = Net()
    model.part = quantize_(
        nn.Sequential(Own(2, 2, 1), nn.ReLU(), nn.BatchNorm2d(2), nn.Embedding(2, 2), nn.Linear(2, 2))
    )
    recipe = dict(
        skip=['part.4'],
        weight=dict(bits=4),
        activation=dict(calibrator='max'),
        overrides=[dict(layers='*backbone.3', weight=None)],
    )
    lifecycle.configure(model, Recipe.from_dict({'target': 'simulation', **(recipe or {})}))
    before = coverage(model)
    assert row_of(before, 'net.left').activation == '8 bits, no range yet'
    lifecycle.calibrate(model, [torch.linspace(-2, 2, 192).reshape(1, 3, 8, 8)], model.net)

    rows = coverage(model)
    assert [r.name for r in rows] == [
        'net.backbone.0',
        'net.backbone.3',
        'net.left',
        'net.right',
        'net.idle',
        'net.head',
        'net.add',
        'net.concat',
        'part.0',
        'part.2',
        'part.3',
        'part.4',
    ]
    first = row_of(rows, 'net.backbone.0')
    assert first[1:6] == ('Conv2d', 'int4 per channel', 'int8 amax 2', '', '') and first.quantized
    assert row_of(rows, 'net.backbone.3').weight == ''
    assert row_of(rows, 'net.backbone.3').activation.startswith('uint8 amax ')
    assert row_of(rows, 'net.backbone.3').quantized
    left, right = row_of(rows, 'net.left'), row_of(rows, 'net.right')
    assert (left.shared_with, right.shared_with) == ('', 'net.left')
    assert left.activation == right.activation != ''
    idle = row_of(rows, 'net.idle')
    assert not idle.quantized and idle.note == 'saw no data during calibration'
    assert row_of(rows, 'net.head')[1:6] == ('Linear', '', '', '', 'its part of the model has no Quant type')
    assert row_of(rows, 'net.add').kind == 'Add' and row_of(rows, 'net.add').quantized
    assert row_of(rows, 'net.concat').kind == 'Concat' and row_of(rows, 'net.concat').weight == ''
    assert 'Own computes in its own way' in row_of(rows, 'part.0').note
    assert row_of(rows, 'part.2')[1:6] == ('BatchNorm2d', '', '', '', 'no layer before it to fold into')
    assert row_of(rows, 'part.3').note == 'no quantized version of this type'
    assert row_of(rows, 'part.4').note == "skipped by 'part.4'" and not row_of(rows, 'part.4').quantized

    table = coverage_table(rows).splitlines()
    assert len(table) == 2 + len(rows) + 1
    for line, row in zip(table[2:], rows):
        assert line.startswith(row.name) and row.kind in line and line.endswith(row.note)
    assert (
        table[-1] == "4 of 10 layers quantized, and 2 additions and concatenations, for target 'simulation'"
    )


def test_coverage_says_when_quantizers_are_switched_off():
    model = configured(dict(mode='float'))
    row = row_of(coverage(model), 'left')
    assert not row.quantized and row.note == 'switched off'


def test_coverage_of_a_loaded_checkpoint_is_that_of_the_calibrated_model():
    source, target, bare = calibrated(), configured(), configured()
    # That the last two read one tensor was found in calibration; the stamp of a checkpoint holds it.
    stamped = json.loads(json.dumps(checkpoints.stamp(Recipe(), source)))
    assert stamped['shared_scales'] == [['add', 'concat']]
    checkpoints.restore_sharing({checkpoints.META_KEY: stamped}, target)
    for model in (target, bare):
        model.load_state_dict(source.state_dict())
    for mine, plain, theirs in zip(coverage(target), coverage(bare), coverage(source)):
        assert mine[:5] == theirs[:5] and plain[:4] == theirs[:4]
    assert target.concat.input_quantizer is target.add.input_quantizer
    assert bare.concat.input_quantizer is not bare.add.input_quantizer
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(target(x), source(x)) and torch.equal(bare(x), source(x))


def test_a_copy_of_a_calibrated_model_is_independent_and_the_same():
    model = calibrated()
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert torch.equal(twin(x), expected)
    lifecycle.set_enabled(twin, False)
    assert torch.equal(model(x), expected)


def test_quantizable_types_are_named():
    names = quantizable_types()
    assert names == sorted(names) and {'Conv2d', 'Linear', 'ConvTranspose2d'} <= set(names)


def test_dynamic_ranges_follow_the_input_and_static_ones_do_not():
    torch.manual_seed(0)
    source = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x, errors = torch.randn(2, 3, 9, 9), {}
    for kind in ('static', 'dynamic'):
        model = quantize_(copy.deepcopy(source))
        lifecycle.configure(model, Recipe.from_dict({'target': 'simulation', 'activation': {'range': kind}}))
        with torch.no_grad():
            lifecycle.calibrate(model, [x], model)
            errors[kind] = float((model(20 * x) - source(20 * x)).norm() / source(20 * x).norm())
        rows = coverage(model)
        assert [r.activation.endswith(' dynamic') for r in rows] == [kind == 'dynamic'] * 2
        # Behind the ReLU nothing was negative, whatever the range.
        assert rows[1].activation.startswith('uint8')
    assert errors['dynamic'] < 0.05 < 0.5 < errors['static']


def test_calibration_leaves_switched_off_what_was_off():
    model = calibrated()
    off = [model.backbone[3].input_quantizer, model.left.weight_quantizer]
    for quantizer in off:
        quantizer.disable()
    lifecycle.calibrate(model, batches(), model)
    assert [q for q in lifecycle.quantizers(model) if not q.enabled] == off
    # They have ranges all the same, for when they are switched on.
    assert all(q.has_range for q in off)


def test_the_reason_for_staying_float_goes_when_a_recalibration_reaches_the_layer():
    model = configured()
    reached = model.idle
    lifecycle.calibrate(model, batches(), model)
    assert reached.float_reason == 'saw no data during calibration'

    def forward(batch):
        model(batch)
        reached(torch.rand(1, 6, 2, 2))

    lifecycle.calibrate(model, batches(), forward)
    assert reached.float_reason == '' and reached.input_quantizer.has_range
    assert reached.weight_quantizer.has_range


def test_quantizers_are_the_same_objects_from_build_on():
    model = Net().eval()
    first = model.backbone[0].input_quantizer, model.left.weight_quantizer
    lifecycle.configure(model, Recipe())
    assert first == (model.backbone[0].input_quantizer, model.left.weight_quantizer)
    built = {
        name: (u.input_quantizer, getattr(u, 'weight_quantizer', None)) for name, u in lifecycle.units(model)
    }
    assert built['left'][0] is built['right'][0]
    for recipe in (
        {},
        dict(weight=dict(bits=4)),
        dict(skip=['left', 'right']),
        dict(activation=dict(bits=6)),
    ):
        lifecycle.configure(model, Recipe.from_dict({'target': 'simulation', **recipe}))
        for name, unit in lifecycle.units(model):
            if recipe.get('skip') and name in recipe['skip']:
                assert unit.input_quantizer is None
                continue
            assert unit.input_quantizer is built[name][0]
            assert getattr(unit, 'weight_quantizer', None) is built[name][1]
    # Layers that read one tensor in two ways need one more; the first keeps the one that was built.
    other = dict(overrides=[dict(layers='right', activation=dict(bits=4))])
    lifecycle.configure(model, Recipe.from_dict({'target': 'simulation', **other}))
    assert model.left.input_quantizer is built['left'][0]
    assert model.right.input_quantizer is not built['left'][0]
    lifecycle.configure(model, Recipe())
    assert model.left.input_quantizer is model.right.input_quantizer is built['left'][0]


class Half(nn.Linear):
    """A linear layer with a class of its own, as frameworks have them."""


def test_a_quantized_layer_of_a_derived_class_travels_between_processes(tmp_path):
    model = quantize_(nn.Sequential(Half(3, 2), nn.Linear(2, 2)))
    lifecycle.configure(model, Recipe())
    x = torch.randn(4, 3)
    lifecycle.calibrate(model, [x], model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied[0]) is type(model[0]) and torch.equal(copied(x), model(x))
    torch.save(dict(model=model, x=x, y=model(x)), tmp_path / 'model.pth')
    code = (
        'import sys, torch; sys.path.insert(0, sys.argv[2])\n'
        "c = torch.load(sys.argv[1], weights_only=False)\nassert torch.allclose(c['model'](c['x']), c['y'])"
    )
    command = [sys.executable, '-c', code, str(tmp_path / 'model.pth'), str(Path(__file__).parent)]
    subprocess.run(command, check=True, env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)})


def test_layers_that_share_a_quantizer_but_read_several_tensors_are_named_in_calibration(caplog):
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
            quantize_(self)

        def setup_quant(self):
            share_input([self.a, self.b])

        def forward(self, x):
            return self.b(self.a(x))

    model = Wrong()
    lifecycle.configure(model, Recipe())
    with caplog.at_level(logging.WARNING):
        lifecycle.calibrate(model, [torch.randn(1, 2, 3, 3)] * 2, model)
    assert caplog.text.count('but read several: a, b') == 1
