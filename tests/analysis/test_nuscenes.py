"""AP by distance, beside the nuScenes devkit."""

import numpy as np
import pytest

pytest.importorskip('nuscenes.nuscenes')

from nuscenes.eval.detection.config import config_factory
from nuscenes.eval.detection.evaluate import DetectionEval

from q3d_plugin.analysis import nuscenes as analysis
from q3d_plugin.errors import Q3DError

VERSION = 'v1.0-mini'


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


def test_what_does_not_go_together_is_refused(root, written, tmp_path):
    with pytest.raises(Q3DError, match='has no ground truth'):
        analysis.Detections(written(), str(root), 'v1.0-test')
    with pytest.raises(Q3DError, match='has no folder v1.0-mini'):
        analysis.Detections(written(), str(tmp_path), VERSION)
    with pytest.raises(Q3DError, match='other frames'):
        analysis.Detections(written(frames=1), str(root), VERSION)
    with pytest.raises(Q3DError, match='does not go with'):
        analysis.Detections(tmp_path / 'none.json', str(root), VERSION)
