"""AP by distance and the frame from above, beside the nuScenes devkit."""

import json

import numpy as np
import pytest

pytest.importorskip('nuscenes.nuscenes')

from nuscenes import NuScenes
from nuscenes.eval.common.loaders import load_gt
from nuscenes.eval.detection.config import config_factory
from nuscenes.eval.detection.data_classes import DetectionBox
from nuscenes.eval.detection.evaluate import DetectionEval

from q3d_plugin.analysis import nuscenes as analysis
from q3d_plugin.errors import Q3DError

VERSION = 'v1.0-mini'


@pytest.fixture(scope='module')
def root(toy_nuscenes):
    return toy_nuscenes


@pytest.fixture(scope='module')
def nusc(root):
    return NuScenes(version=VERSION, dataroot=str(root), verbose=False)


@pytest.fixture
def written(root, nusc, tmp_path):
    """Writes the ground truth as detections, those whose distance ``keep`` takes, moved by ``noise``."""

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
        path = tmp_path / 'results_nusc.json'
        path.write_text(json.dumps({'meta': dict.fromkeys(_MODALITIES, False), 'results': results}))
        return path

    return write


_MODALITIES = ('use_camera', 'use_lidar', 'use_radar', 'use_map', 'use_external')


def test_what_is_found_as_it_is_has_an_ap_of_one_and_what_is_far_and_missed_of_zero(root, written):
    detections = analysis.Detections(written(keep=lambda d: d < 40), str(root), VERSION)
    found = analysis.ap_by_distance(detections)
    far = {b.detection_name for b in detections.truth.all if b.ego_dist >= 40}
    near = {b.detection_name for b in detections.truth.all if b.ego_dist < 20}
    assert far and near
    for name, (first, second, third) in ((k, v) for k, v in found.items() if k != 'mean'):
        assert first == (pytest.approx(1) if name in near else None), name
        assert second is None or second == pytest.approx(1), name
        assert third == (0 if name in far else None), name
    assert found['mean'] == [pytest.approx(1), pytest.approx(1), 0]


def test_one_ring_for_all_is_the_evaluation_of_the_devkit(root, nusc, written, tmp_path):
    path = written(noise=0.8)
    ours = analysis.ap_by_distance(analysis.Detections(path, str(root), VERSION), [(0, float('inf'))])
    config = config_factory('detection_cvpr_2019')
    theirs, _ = DetectionEval(nusc, config, str(path), 'mini_val', str(tmp_path), verbose=False).evaluate()
    present = {name: ap for name, (ap,) in ours.items() if ap is not None and name != 'mean'}
    assert present == pytest.approx({name: theirs.mean_dist_aps[name] for name in present})
    assert 0.1 < ours['mean'][0] < 0.9
    assert ours['mean'][0] == pytest.approx(np.mean(list(present.values())))


def test_boxes_are_drawn_where_the_devkit_has_them_in_the_frame_of_the_lidar(
    root, nusc, written, monkeypatch
):
    detections = analysis.Detections(written(), str(root), VERSION)
    outlines = []
    corners = analysis._corners
    monkeypatch.setattr(analysis, '_corners', lambda *a: outlines.append(corners(*a)) or outlines[-1])
    picture, words = analysis.frame_from_above(detections, score=0.5)
    assert picture.startswith(b'\x89PNG')
    token = words.split()[1].rstrip(',')
    truth = detections.truth[token]
    assert len(truth) == max(len(detections.truth[t]) for t in detections.truth.sample_tokens)
    assert len(outlines) == len(truth) + sum(b.detection_score >= 0.5 for b in detections.predicted[token])
    _, boxes, _ = nusc.get_sample_data(nusc.get('sample', token)['data']['LIDAR_TOP'])
    theirs = [box.bottom_corners()[:2].T for box in boxes]
    for outline in outlines:
        closest = min(np.abs(_sorted(outline[:4]) - _sorted(box)).max() for box in theirs)
        # The devkit's corners lie on the tilted floor of the box, the outline at half of its height.
        assert closest < 0.15


def _sorted(points):
    """Corners in one order, whichever comes first."""
    middle = points.mean(0)
    return points[np.argsort(np.arctan2(*(points - middle).T))]


def test_what_does_not_go_together_is_refused(root, written, tmp_path):
    with pytest.raises(Q3DError, match='has no ground truth'):
        analysis.Detections(written(), str(root), 'v1.0-test')
    with pytest.raises(Q3DError, match='has no folder v1.0-mini'):
        analysis.Detections(written(), str(tmp_path), VERSION)
    with pytest.raises(Q3DError, match='other frames'):
        analysis.Detections(written(frames=1), str(root), VERSION)
    with pytest.raises(Q3DError, match='does not go with'):
        analysis.Detections(tmp_path / 'none.json', str(root), VERSION)
