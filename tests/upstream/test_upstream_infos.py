"""Info files by OpenPCDet's own converter: set OPENPCDET_ROOT to a checkout to run this."""

import os
import pickle
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not os.environ.get('OPENPCDET_ROOT'), reason='OPENPCDET_ROOT is not set')


def test_the_info_files_of_openpcdet_are_whole_and_list_every_frame(tmp_path):
    root = tmp_path / 'set'
    command = [sys.executable, '-m', 'q3d_plugin', 'toy-data', '--out', str(root), '--infos', 'openpcdet']
    command += ['--train-scenes', '1', '--val-scenes', '1', '--frames', '2']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = root / 'v1.0-mini'
    for split in ('train', 'val'):
        frames = pickle.loads((folder / f'nuscenes_infos_2sweeps_{split}.pkl').read_bytes())
        assert len(frames) == 2
        for frame in frames:
            assert (folder / frame['lidar_path']).is_file() and len(frame['sweeps']) == 1
            assert len(frame['gt_boxes']) > 10
    assert not list(root.glob('.*'))
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert 'reusing it' in again.stdout and 'already holds the info files of openpcdet' in again.stdout
