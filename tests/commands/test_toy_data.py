"""``q3d toy-data`` and ``q3d infos``: the data set and the frameworks' own info files of it."""

import pickle
import subprocess
import sys

import pytest

from q3d_plugin.commands import infos, main, toy_data

SMALL = ('--train-scenes', '1', '--val-scenes', '1', '--frames', '2')


@pytest.fixture
def no_frameworks(monkeypatch):
    """No framework is at hand, whatever is installed."""
    for variable in ('MMDET3D_ROOT', 'OPENPCDET_ROOT'):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(toy_data.importlib.util, 'find_spec', lambda name: None)


def test_frameworks_are_found_by_installation_and_by_variable(no_frameworks, monkeypatch):
    assert toy_data.frameworks_at_hand() == []
    monkeypatch.setenv('OPENPCDET_ROOT', '/somewhere')
    assert toy_data.frameworks_at_hand() == ['openpcdet']
    monkeypatch.setattr(toy_data.importlib.util, 'find_spec', lambda name: name == 'mmdet3d' or None)
    assert toy_data.frameworks_at_hand() == ['mmdet3d', 'openpcdet']


@pytest.mark.parametrize(
    'options, made',
    [
        ([], ['mmdet3d', 'openpcdet']),
        (['--infos', 'auto'], ['mmdet3d', 'openpcdet']),
        (['--infos', 'none'], []),
        (['--infos', 'openpcdet'], ['openpcdet']),
        (['--infos', 'openpcdet', 'mmdet3d', 'openpcdet'], ['openpcdet', 'mmdet3d']),
    ],
)
def test_info_files_are_those_that_were_asked_for_and_are_missing(tmp_path, monkeypatch, options, made):
    written = []

    def write(framework, root, version, sweeps):
        written.append(framework)
        for path in infos.info_files(framework, root, version, sweeps):
            path.parent.mkdir(exist_ok=True)
            path.write_text('')

    monkeypatch.setattr(toy_data, 'generate', lambda out, arguments, processes: out.mkdir(exist_ok=True))
    monkeypatch.setattr(toy_data, 'frameworks_at_hand', lambda: ['mmdet3d', 'openpcdet'])
    monkeypatch.setattr(infos, 'write_infos', write)
    for _ in range(2):
        assert main(['toy-data', '--out', str(tmp_path / 'set'), *options]) == 0
    assert written == made
    if 'mmdet3d' in made:
        (tmp_path / 'set' / 'nuscenes_infos_val.pkl').unlink()
        assert main(['toy-data', '--out', str(tmp_path / 'set'), *options]) == 0
        assert written == [*made, 'mmdet3d']


def test_without_a_framework_the_data_is_made_and_the_reason_told(
    no_frameworks, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(toy_data, 'generate', lambda out, arguments, processes: 'wrote it')
    assert main(['toy-data', '--out', str(tmp_path / 'set')]) == 0
    assert capsys.readouterr().out.splitlines()[0] == 'wrote it'
    assert main(['toy-data', '--out', str(tmp_path / 'set'), '--infos', 'none', 'mmdet3d']) == 2
    assert '--infos: none mmdet3d was given' in capsys.readouterr().err


@pytest.mark.parametrize('processes', ['0', '65'])
def test_processes_are_counted(tmp_path, capsys, processes):
    assert main(['toy-data', '--out', str(tmp_path / 'set'), '--processes', processes]) == 2
    assert f'--processes: {processes} was given; 1 to 64' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('framework', ['mmdet3d', 'openpcdet'])
def test_a_folder_without_a_data_set_is_refused(tmp_path, capsys, framework):
    assert main(['infos', framework, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and str(tmp_path) in error and 'v1.0-mini' in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('framework, sweeps', [('mmdet3d', '-1'), ('openpcdet', '0')])
def test_numbers_of_sweeps_that_mean_nothing_are_refused(tmp_path, capsys, framework, sweeps):
    assert main(['infos', framework, str(tmp_path), f'--sweeps={sweeps}']) == 2
    assert f'--sweeps: {sweeps} was given' in capsys.readouterr().err


def test_the_info_files_of_mmdetection3d_are_whole_and_list_every_frame(tmp_path):
    pytest.importorskip('mmdet3d')
    root = tmp_path / 'set'
    command = [
        sys.executable,
        '-m',
        'q3d_plugin',
        'toy-data',
        '--out',
        str(root),
        *SMALL,
        '--infos',
        'mmdet3d',
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before = {p.name for p in root.iterdir()}
    for split in ('train', 'val'):
        content = pickle.loads((root / f'nuscenes_infos_{split}.pkl').read_bytes())
        assert len(content['data_list']) == 2 and content['metainfo']['version'] == 'v1.0-mini'
        for frame in content['data_list']:
            assert (root / 'samples' / 'LIDAR_TOP' / frame['lidar_points']['lidar_path']).is_file()
            assert len(frame['instances']) > 10
    assert before == {
        *('maps', 'samples', 'sweeps', 'toy_nuscenes.json', 'v1.0-mini'),
        *('nuscenes_infos_train.pkl', 'nuscenes_infos_val.pkl'),
    }
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert 'reusing it' in again.stdout and 'already holds the info files of mmdet3d' in again.stdout


def test_a_conversion_that_fails_leaves_the_data_set_as_it_was(tmp_path, monkeypatch):
    pytest.importorskip('mmdet3d')
    from q3d_plugin.mmdet3d.infos import make_infos

    above, root = tmp_path / 'checkout', tmp_path / 'set'
    converters = above / 'tools' / 'dataset_converters'
    converters.mkdir(parents=True)
    (above / 'tools' / '__init__.py').write_text('')
    (converters / '__init__.py').write_text('')
    (converters / 'nuscenes_converter.py').write_text(
        'def create_nuscenes_infos(root, prefix, version, max_sweeps):\n'
        "    for split in ('train', 'val'):\n"
        "        open(f'{root}/{prefix}_infos_{split}.pkl', 'w').close()\n"
    )
    (converters / 'update_infos_to_v2.py').write_text(
        "def update_pkl_infos(name, out_dir, pkl_path):\n    raise RuntimeError('the second step failed')\n"
    )
    root.mkdir()
    for name in [n for n in sys.modules if n == 'tools' or n.startswith('tools.')]:
        monkeypatch.delitem(sys.modules, name)
    path, folder = list(sys.path), sys.path[0]
    try:
        with pytest.raises(RuntimeError, match='the second step failed'):
            make_infos(root, 'v1.0-mini', 1, 'nuscenes', above)
    finally:
        for name in [n for n in sys.modules if n == 'tools' or n.startswith('tools.')]:
            del sys.modules[name]
    assert list(root.iterdir()) == []
    assert sys.path == path and sys.path[0] == folder
