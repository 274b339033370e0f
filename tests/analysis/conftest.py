"""Detections on the small generated data set, made of its ground truth."""

import json

import numpy as np
import pytest

VERSION = 'v1.0-mini'
_MODALITIES = ('use_camera', 'use_lidar', 'use_radar', 'use_map', 'use_external')


@pytest.fixture(scope='module')
def root(toy_nuscenes):
    return toy_nuscenes


@pytest.fixture(scope='module')
def nusc(root):
    pytest.importorskip('nuscenes.nuscenes')
    from nuscenes import NuScenes

    return NuScenes(version=VERSION, dataroot=str(root), verbose=False)


@pytest.fixture
def written(root, nusc, tmp_path):
    """Writes the ground truth as detections, those whose distance ``keep`` takes, moved by ``noise``."""

    from nuscenes.eval.common.loaders import load_gt
    from nuscenes.eval.detection.data_classes import DetectionBox

    def write(keep=lambda distance: True, noise=0.0, frames=None):
        random = np.random.default_rng(0)
        truth = load_gt(nusc, 'mini_val', DetectionBox, verbose=False)
        results = {}
        for token in truth.sample_tokens[:frames]:
            data = nusc.get('sample_data', nusc.get('sample', token)['data']['LIDAR_TOP'])
            vehicle = np.array(nusc.get('ego_pose', data['ego_pose_token'])['translation'])
            results[token] = []
            for box in truth[token]:
                # The devkit takes boxes without points from the ground truth.
                if box.num_pts == 0 or not keep(np.linalg.norm((np.array(box.translation) - vehicle)[:2])):
                    continue
                results[token].append(
                    {
                        'sample_token': token,
                        'translation': list(np.array(box.translation) + noise * random.normal(size=3)),
                        'size': list(box.size),
                        'rotation': list(box.rotation),
                        'velocity': [0.0, 0.0],
                        'detection_name': box.detection_name,
                        'detection_score': float(random.uniform(0.2, 1)),
                        'attribute_name': box.attribute_name,
                    }
                )
        path = tmp_path / f'{noise}' / 'results_nusc.json'
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({'meta': dict.fromkeys(_MODALITIES, False), 'results': results}))
        return path

    return write
