"""The life of a quantized detector on the contract double: load, calibrate, save, load again."""

import json
import logging

import numpy as np
import pytest
import torch

from q3d_plugin import lifecycle
from q3d_plugin.coverage import coverage
from q3d_plugin.errors import Q3DError
from q3d_plugin.quantizer import Mode

RECIPE = {'ACTIVATION': {'CALIBRATOR': 'max'}, 'CALIBRATION': {'FRAMES': 2}}
QAT = {**RECIPE, 'MODE': 'qat'}


def ranges(model):
    return {n: v.clone() for n, v in model.state_dict().items() if n.endswith(('_amax', '_state'))}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log_text(tmp_path):
    return (tmp_path / 'run' / 'log_eval.txt').read_text()


@pytest.fixture
def quantized(make, outputs, float_file, run_logger, tmp_path):
    """A calibrated detector, its raw outputs, and the checkpoint that it saved."""
    model = make(RECIPE)
    model.load_params_from_file(str(float_file), run_logger)
    return model, outputs(model), tmp_path / 'run' / 'quantized.pth'


def test_calibrated_at_the_first_forward_saved_and_the_same_again(
    make, outputs, float_file, run_logger, tmp_path
):
    model = make(RECIPE)
    model.load_params_from_file(str(float_file), run_logger)
    # tools/test.py moves the detector to its device after loading, so nothing was computed yet.
    assert not lifecycle.is_calibrated(model) and not (tmp_path / 'run' / 'quantized.pth').exists()
    first = outputs(model)
    text = log_text(tmp_path)
    assert 'calibrating on 2 frames of the train split' in text and 'layers quantized' in text
    assert outputs(model).keys() == first.keys() and log_text(tmp_path) == text
    rows = json.loads((tmp_path / 'run' / 'coverage.json').read_text())
    assert rows and all(r['quantized'] for r in rows)

    path = tmp_path / 'run' / 'quantized.pth'
    content = torch.load(path, weights_only=True)
    assert content['meta']['q3d']['recipe']['calibration']['frames'] == 2
    again = make(RECIPE)
    again.load_params_from_file(str(path), run_logger)
    assert same(outputs(again), first) and same(ranges(again), ranges(model))
    assert log_text(tmp_path).count('calibrating on') == 1
    assert not [p for p in (tmp_path / 'run').iterdir() if p.suffix == '.tmp']


@pytest.mark.parametrize('mode', ['static', 'dynamic'])
@pytest.mark.parametrize('alpha', [0.0, 0.5, 1.0, 'search'])
def test_a_smoothed_detector_is_float_when_it_is_off_and_the_same_when_loaded(
    make, outputs, float_file, run_logger, tmp_path, alpha, mode
):
    reference = make()
    reference.load_params_from_file(str(float_file), run_logger)
    recipe = {**RECIPE, 'TARGET': 'simulation', 'SMOOTHQUANT': {'ALPHA': alpha, 'MODE': mode}}
    model = make(recipe)
    model.load_params_from_file(str(float_file), run_logger)
    first = outputs(model)
    again = make(recipe)
    again.load_params_from_file(str(tmp_path / 'run' / 'quantized.pth'), run_logger)
    assert same(outputs(again), first)
    lifecycle.set_enabled(model, False)
    expected = outputs(reference)
    for name, value in outputs(model).items():
        assert (value - expected[name]).abs().max() < 1e-4 * expected[name].abs().max(), name
    rows = [r for r in coverage(model) if r.kind not in ('Add', 'Concat')]
    assert all('SmoothQuant' in r.note for r in rows)
    if mode == 'static':
        assert sum(r.smoothquant['explicit'] for r in rows) <= 1


def test_random_numbers_of_the_run_do_not_depend_on_calibration(make, batch, float_file, run_logger):
    model = make(RECIPE)
    model.load_params_from_file(str(float_file), run_logger)
    frames = batch(model)
    np.random.seed(5), torch.manual_seed(5)
    expected = np.random.rand(), torch.rand(())
    np.random.seed(5), torch.manual_seed(5)
    with torch.no_grad():
        model(frames)
    assert (np.random.rand(), torch.rand(())) == expected


def test_the_recipe_may_differ_in_mode_and_calibration_only(make, outputs, quantized, run_logger):
    _, expected, path = quantized
    other = make({**QAT, 'CALIBRATION': {'FRAMES': 1, 'SPLIT': 'val'}})
    other.load_params_from_file(str(path), run_logger)
    assert same(outputs(other), expected)
    other = make({**RECIPE, 'WEIGHT': {'CALIBRATOR': 'mse'}, 'SKIP': ['backbone_3d']})
    words = r"another recipe.*MODEL\.QUANT\.WEIGHT\.CALIBRATOR: 'max' and 'mse'.*QUANT\.SKIP"
    with pytest.raises(Q3DError, match=words):
        other.load_params_from_file(str(path), run_logger)
    other = make({**RECIPE, 'TARGET': 'openvino'})
    with pytest.raises(Q3DError, match=r"another target: 'tensorrt', and MODEL\.QUANT\.TARGET is 'openvino'"):
        other.load_params_from_file(str(path), run_logger)


def test_mode_float_switches_everything_off(make, outputs, quantized, float_file, run_logger):
    reference = make()
    reference.load_params_from_file(str(float_file), run_logger)
    model = make({**RECIPE, 'MODE': 'float'})
    for path in (float_file, quantized[2]):
        model.load_params_from_file(str(path), run_logger)
        for name, value in outputs(model).items():
            torch.testing.assert_close(value, outputs(reference)[name], rtol=1e-4, atol=1e-5)


def test_several_checkpoints_one_after_the_other(make, outputs, quantized, float_file, run_logger, tmp_path):
    """``--eval_all`` loads them all into one detector: each float one is calibrated anew."""
    model, first, path = quantized
    scaled = torch.load(float_file, weights_only=True)
    key = 'backbone_3d.conv_input.0.weight'
    scaled['model_state'][key] = scaled['model_state'][key] * 3
    other = tmp_path / 'checkpoint_epoch_7.pth'
    torch.save(scaled, other)
    model.load_params_from_file(str(other), run_logger)
    assert {q.mode for q in lifecycle.quantizers(model)} == {Mode.UNCALIBRATED}
    assert not same(outputs(model), first)
    assert (tmp_path / 'run' / 'quantized_checkpoint_epoch_7.pth').is_file()
    model.load_params_from_file(str(path), run_logger)
    assert same(outputs(model), first)
    assert log_text(tmp_path).count('calibrating on') == 2


def test_a_log_without_a_file_saves_nothing(make, outputs, float_file, caplog, tmp_path):
    model = make(RECIPE)
    with caplog.at_level(logging.WARNING):
        model.load_params_from_file(str(float_file), logging.getLogger('no_file'))
        outputs(model)
    assert 'no folder for quantized.pth' in caplog.text
    assert not list(tmp_path.glob('**/quantized*.pth'))


@pytest.mark.parametrize(
    ('split', 'tokens'), [('train', 'train'), ('val', 'val'), ('test', 'val')], ids=['train', 'val', 'test']
)
def test_the_split_is_read_as_it_is_tested(adapter, make, split, tokens):
    from q3d_plugin.recipe import CalibrationSpec

    model = make(training=True)
    spec = CalibrationSpec(split, frames=2, seed=1)
    loader, count = adapter.data.calibration_loader(model.dataset, spec, logging.getLogger('x'))
    names = [adapter.data.frame_name(frames) for frames in loader]
    assert count == len(names) == 2 and all(name.startswith(tokens) for name in names)
    assert loader.dataset.dataset.training is False
    # The same frames with the same random numbers, whatever was drawn before.
    first = [frames['voxel_coords'] for frames in loader]
    np.random.rand(3)
    for a, b in zip(first, loader):
        assert np.array_equal(a, b['voxel_coords'])
    assert model.dataset.dataset_cfg.INFO_PATH.test == ['val.json']


def test_a_split_that_is_not_there(adapter, make, toy_set):
    from q3d_plugin.recipe import CalibrationSpec

    dataset = make().dataset
    dataset.dataset_cfg.DATA_SPLIT = {'train': 'train', 'evaluation': 'test'}
    with pytest.raises(Q3DError, match=r"CALIBRATION\.SPLIT: 'val' was given.*'train', 'test'"):
        adapter.data.calibration_cfg(dataset.dataset_cfg, 'val')
    (toy_set / 'v1.0-mini' / 'train.json').unlink()
    with pytest.raises(Q3DError, match=r"CALIBRATION\.SPLIT: 'train' has no frames.*train\.json"):
        adapter.data.calibration_loader(dataset, CalibrationSpec(), logging.getLogger('x'))


def test_too_few_frames_are_said(make, outputs, float_file, run_logger, tmp_path):
    model = make({**RECIPE, 'CALIBRATION': {'FRAMES': 50}})
    model.load_params_from_file(str(float_file), run_logger)
    outputs(model)
    assert 'MODEL.QUANT.CALIBRATION.FRAMES: 50 were asked for, the train split has 3' in log_text(tmp_path)


def test_nan_names_layer_and_frame(make, outputs, toy_set, float_file, run_logger, tmp_path):
    infos = [{'token': 'broken', 'seed': 1, 'nan': True}]
    (toy_set / 'v1.0-mini' / 'train.json').write_text(json.dumps(infos))
    model = make(RECIPE)
    model.load_params_from_file(str(float_file), run_logger)
    with pytest.raises(Q3DError, match=r"NaN or Inf.*'backbone_3d\.conv_input\.0'.*frame broken"):
        outputs(model)
    assert not (tmp_path / 'run' / 'quantized.pth').exists()


def test_a_detector_without_a_checkpoint_does_not_run(make, outputs):
    with pytest.raises(Q3DError, match='no checkpoint to quantize.*--ckpt'):
        outputs(make(RECIPE))


def as_spconv1(state, detector_keys):
    """Sparse weights (out, k, k, k, in) as spconv 1.x holds them: (k, k, k, in, out)."""
    return {k: v.permute(1, 2, 3, 4, 0).contiguous() if k in detector_keys else v for k, v in state.items()}


def test_a_checkpoint_of_spconv_1_is_permuted_then_folded(make, outputs, float_file, run_logger, tmp_path):
    content = torch.load(float_file, weights_only=True)
    state = content['model_state']
    sparse = {k for k, v in state.items() if k.startswith('backbone_3d') and v.dim() == 5}
    assert len(sparse) == 21
    content['model_state'] = as_spconv1(state, sparse)
    path = tmp_path / 'old.pth'
    torch.save(content, path)
    reference, model = make(), make({'MODE': 'float'})
    reference.load_params_from_file(str(path), run_logger)
    model.load_params_from_file(str(path), run_logger)
    expected = outputs(reference)
    for name, value in outputs(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    other = make({'MODE': 'float'})
    other.load_params_from_file(str(float_file), run_logger)
    assert same(outputs(other), outputs(model))


def changed(float_file, tmp_path, change):
    content = torch.load(float_file, weights_only=True)
    change(content)
    path = tmp_path / 'changed.pth'
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (
            lambda c: c['model_state'].pop('dense_head.shared_conv.0.weight'),
            'dense_head.shared_conv.0.weight',
        ),
        (
            lambda c: c['model_state'].pop('backbone_2d.blocks.0.2.running_var'),
            "'backbone_2d.blocks.0.1.bias' is missing",
        ),
        (
            lambda c: c['model_state'].update({'roi_head.fc.weight': torch.zeros(1)}),
            "'roi_head.fc.weight' has no place",
        ),
        (
            lambda c: c['model_state'].update({'dense_head.shared_conv.0.bias': torch.zeros(3)}),
            "'dense_head.shared_conv.0.bias' has the shape",
        ),
        (lambda c: c.update(state_dict=c.pop('model_state')), 'MMDetection3D'),
        (lambda c: c.update(weights=c.pop('model_state')), 'it has no model_state'),
        (lambda c: c.update(extra=np.random.RandomState), 'no plain data'),
    ],
    ids=['missing', 'half_a_norm', 'too_many', 'shape', 'mmdet3d', 'other', 'objects'],
)
def test_what_does_not_fit_is_named(make, float_file, run_logger, tmp_path, change, words):
    path = changed(float_file, tmp_path, change)
    model = make(QAT)
    with pytest.raises(Q3DError) as caught:
        model.load_params_from_file(str(path), run_logger)
    assert words in str(caught.value) and 'changed.pth' in str(caught.value)
    # tools/train.py swallows errors while it looks for a checkpoint to resume from.
    assert words in log_text(tmp_path)
    with pytest.raises(Q3DError, match=r'--pretrained_model.*changed\.pth'):
        model.train()(None)


def test_a_cut_or_missing_file_is_named(make, float_file, run_logger, tmp_path):
    path = tmp_path / 'cut.pth'
    path.write_bytes(float_file.read_bytes()[:-2000])
    with pytest.raises(Q3DError, match='cut.pth.*truncated'):
        make(RECIPE).load_params_from_file(str(path), run_logger)
    with pytest.raises(Q3DError, match='gone.pth.*is not a file'):
        make(RECIPE).load_params_from_file(str(tmp_path / 'gone.pth'), run_logger)


def test_a_second_checkpoint_wins(make, outputs, float_file, quantized, run_logger, tmp_path):
    key = 'dense_head.heads_list.0.dim.0.bias'
    other = tmp_path / 'other.pth'
    torch.save({'model_state': {key: torch.full((3,), 7.0)}}, other)
    model = make(RECIPE)
    model.load_params_from_file(str(float_file), run_logger, pre_trained_path=str(other))
    assert model.state_dict()[key].tolist() == [7.0] * 3
    with pytest.raises(Q3DError, match='one is quantized and the other float'):
        model.load_params_from_file(str(quantized[2]), run_logger, pre_trained_path=str(other))


def test_patterns_that_match_nothing_fail_at_build(make):
    with pytest.raises(Q3DError, match=r'MODEL\.QUANT\.SKIP\[0\]: .*hm\.7.*did you mean'):
        make({'SKIP': ['dense_head.heads_list.0.hm.7']})


def test_a_float_detector_takes_no_notice_of_a_quantized_checkpoint(make, quantized, run_logger):
    """OpenPCDet's own loading drops what it does not know, so nothing of the plugin is in its way."""
    make().load_params_from_file(str(quantized[2]), run_logger)
