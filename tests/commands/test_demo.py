"""``q3d demo``: float and the same quantized model for two engines, in one table and one picture."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from q3d_plugin.commands import demo, main

METRICS = {'pred/NuScenes/mAP': 0.5, 'pred/NuScenes/NDS': 0.25, 'pred/NuScenes/car_AP_dist_0.5': 0.5}
ROWS = [
    {'name': 'a', 'kind': 'Conv2d', 'quantized': True},
    {'name': 'b', 'kind': 'Conv2d', 'quantized': False},
    {'name': 'c', 'kind': 'Add', 'quantized': True},
]


@pytest.fixture(scope='module')
def toy_set(tmp_path_factory):
    """The smallest generated set: one frame of training and one of validation."""
    root = tmp_path_factory.mktemp('demo') / 'set'
    command = [sys.executable, '-m', 'q3d_plugin', 'toy-data', '--out', str(root), '--infos', 'none']
    command += ['--train-scenes', '1', '--val-scenes', '1', '--frames', '1']
    subprocess.run(command, check=True, capture_output=True)
    return root


@pytest.fixture
def framework(monkeypatch, toy_set):
    """Stands for the processes that the demo starts; collects their arguments and writes what they would."""
    called = []

    def run(arguments, log):
        words = [str(a) for a in arguments]
        called.append(words)
        if words[0] != 'test':
            return
        options = dict(w.split('=', 1) for w in words[words.index('--cfg-options') + 1 :])
        work_dir = Path(words[words.index('--work-dir') + 1])
        target = options.get('custom_hooks.0.recipe.target', 'float')
        sensor = options.get('test_dataloader.dataset.pipeline.5.sensor')
        for stamp in ('20200101_000000', '20200102_000000'):
            folder = work_dir / stamp
            folder.mkdir(parents=True)
            # The older run has other metrics.
            lost = (
                {'float': 0, 'tensorrt': 0.125, 'openvino': 0.0625, 'cameras': 0.25, 'lidar': 0.5}[
                    sensor or target
                ]
                if stamp.endswith('2_000000')
                else 0.5
            )
            metrics = {k: v - lost for k, v in METRICS.items()}
            (folder / f'{stamp}.json').write_text(json.dumps(metrics))
            if target != 'float':
                (folder / 'coverage.json').write_text(json.dumps(ROWS))
        (work_dir / '20200103_000000').mkdir()  # interrupted: without metrics
        samples = json.loads((toy_set / 'v1.0-mini' / 'sample.json').read_text())
        box = {'translation': [0, 0, 0], 'size': [2, 4, 2], 'rotation': [1, 0, 0, 0], 'detection_score': 0.9}
        results = {'results': {s['token']: [box, {**box, 'detection_score': 0.1}] for s in samples}}
        found = Path(options['test_evaluator.jsonfile_prefix']) / 'pred_instances_3d' / 'results_nusc.json'
        found.parent.mkdir(parents=True)
        found.write_text(json.dumps(results))

    monkeypatch.setattr(demo, 'run', run)
    return called


def test_three_models_side_by_side(framework, toy_set, tmp_path, capsys):
    pytest.importorskip('nuscenes')
    pytest.importorskip('matplotlib')
    out = tmp_path / 'out'
    assert main(['demo', '--data', str(toy_set), '--out', str(out), '--seed', '3']) == 0
    assert [words[0] for words in framework] == ['toy-data', 'test', 'test', 'test']
    assert framework[0][1:] == ['--out', str(toy_set), '--seed', '3', '--infos', 'mmdet3d']
    configs = [Path(words[1]).name for words in framework[1:]]
    assert configs == ['toy_centerpoint_voxel.py', *['toy_centerpoint_voxel_w8a8.py'] * 2]
    summary = json.loads((out / 'summary.json').read_text())
    assert {k: summary[k]['mAP'] for k in ('float', 'tensorrt', 'openvino')} == {
        'float': 0.5,
        'tensorrt': 0.375,
        'openvino': 0.4375,
    }
    assert summary['float']['AP'] == {'car': 0.5} and 'layers' not in summary['float']
    quantized = {k: summary['openvino'][k] for k in ('layers', 'quantized_layers', 'quantized_elementwise')}
    assert quantized == {'layers': 2, 'quantized_layers': 1, 'quantized_elementwise': 1}
    assert summary['openvino']['float_layers'] == ['b'] and summary['seed'] == 3
    assert summary['openvino']['run'] == str(out / 'openvino' / '20200102_000000')
    assert summary['frame'] in (toy_set / 'v1.0-mini' / 'sample.json').read_text()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ['float', '0.5000', '0.2500', '0'] in lines
    assert ['W8A8,', 'tensorrt', '0.3750', '-0.1250', '0.1250', '-0.1250', '1', 'of', '2'] in lines
    assert ['W8A8,', 'openvino', '0.4375', '-0.0625', '0.1875', '-0.0625', '1', 'of', '2'] in lines
    assert (out / 'frame.png').read_bytes()[:4] == b'\x89PNG'


def test_two_sensors_are_also_taken_away_one_by_one(framework, toy_set, tmp_path, capsys, monkeypatch):
    pytest.importorskip('nuscenes')
    pytest.importorskip('matplotlib')
    monkeypatch.setattr(demo, 'check_bevfusion', lambda: None)
    out = tmp_path / 'out'
    assert main(['demo', '--detector', 'bevfusion', '--data', str(toy_set), '--out', str(out)]) == 0
    assert framework[0][1:] == [
        *('--out', str(toy_set), '--seed', '0', '--infos', 'mmdet3d', '--profile', 'look-alikes')
    ]
    configs = [Path(words[1]).name for words in framework[1:]]
    plain, quantized = 'toy_bevfusion.py', 'toy_bevfusion_w8a8.py'
    assert configs == [plain, quantized, quantized, plain, plain]
    assert all(Path(words[2]).name == 'toy_bevfusion.pth' for words in framework[1:])
    summary = json.loads((out / 'summary.json').read_text())
    names = ('float', 'tensorrt', 'openvino', 'cameras_blanked', 'lidar_blanked')
    assert [summary[n]['mAP'] for n in names] == [0.5, 0.375, 0.4375, 0.25, 0.0]
    assert 'layers' not in summary['lidar_blanked'] and 'layers' in summary['tensorrt']
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ['float,', 'cameras', 'blanked', '0.2500', '-0.2500', '0.0000', '-0.2500', '0'] in lines
    assert (out / 'frame.png').read_bytes()[:4] == b'\x89PNG'


def test_without_bevfusion_the_demo_ends_before_it_begins(tmp_path, capsys, monkeypatch):
    pytest.importorskip('mmdet3d')
    monkeypatch.delenv('MMDET3D_ROOT', raising=False)
    monkeypatch.chdir(tmp_path)
    for name in [n for n in sys.modules if n.split('.')[0] == 'projects']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, 'path', [p for p in sys.path if p and not (Path(p) / 'projects').is_dir()])
    assert main(['demo', '--detector', 'bevfusion', '--out', 'out']) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'set MMDET3D_ROOT to a source checkout' in error
    assert not (tmp_path / 'out' / 'logs').exists()


@pytest.mark.parametrize('target', demo.TARGETS)
def test_the_options_change_the_target_of_the_hook_and_nothing_else_of_the_recipe(target, tmp_path):
    config = pytest.importorskip('mmengine.config')
    words = demo.arguments_of_test(target, Path('float.pth'), Path('data'), tmp_path)
    options = dict(w.split('=', 1) for w in words[words.index('--cfg-options') + 1 :])
    cfg = config.Config.fromfile(words[1], import_custom_modules=False)
    before = dict(cfg.custom_hooks[0].recipe)
    cfg.merge_from_dict(options)
    assert len(cfg.custom_hooks) == 1 and cfg.custom_hooks[0].type == 'QuantHook'
    assert cfg.custom_hooks[0].recipe == {**before, 'target': target}
    assert cfg.test_dataloader.dataset.data_root == 'data/'
    assert cfg.test_evaluator.ann_file == 'data/nuscenes_infos_val.pkl'


def test_a_failing_step_ends_the_demo_with_its_log(tmp_path, capsys):
    log = tmp_path / 'logs' / 'x.log'
    with pytest.raises(
        demo.Q3DError, match=r'q3d tost failed with exit status 2; all of its output is in .*x\.log'
    ):
        demo.run(['tost'], log)
    assert "'tost' is no command" in capsys.readouterr().err
    assert "'tost' is no command" in log.read_text()
