"""Parts of the benchmark that need no framework: rows, tables, the generated frame."""

import numpy as np
import pytest

from q3d_plugin.benchmark.frame import generated_frame
from q3d_plugin.benchmark.parts import PARTS, chosen_parts
from q3d_plugin.benchmark.rows import Row
from q3d_plugin.benchmark.tables import table


def test_a_missed_target_is_told():
    missed = Row('time', 'x', 2.0, 's', ratio=1.4, target=1.35)
    met = Row('ranges', 'y', 2.9, 's', target=3.0)
    unmeasured = Row('ranges', 'z', None, 's', target=3.0)
    assert (missed.passed, met.passed, unmeasured.passed) == (False, True, None)
    text = table([missed, met, unmeasured], 'headline', ['note'])
    assert text.startswith('headline\n\n') and text.endswith('note\n1 target is missed')
    line = next(line for line in text.splitlines() if line.startswith('x '))
    assert line.split() == ['x', '2.000', 's', '1.400', '<=', '1.35', 'MISSED']
    assert table([met], '').endswith('every target is met')


def test_columns_of_a_section_are_those_that_it_needs():
    text = table([Row('ranges', 'y', 2.9, 's', target=3.0)], '')
    assert 'spread' not in text and 'of float' not in text and 'target' in text


def test_parts_are_chosen_by_name_each_once():
    assert chosen_parts([]) == list(PARTS.values())
    assert chosen_parts(['ptq', 'ptq']) == [PARTS['ptq']]


def test_generated_frame_is_as_dense_as_a_recorded_one_and_always_the_same(tmp_path):
    pytest.importorskip('cv2')
    frame = generated_frame(tmp_path)
    points = frame.points
    assert points.shape == (34_688, 5) and points.dtype == np.float32
    assert np.isfinite(points).all()
    assert 20 < np.abs(points[:, :2]).max() < 80
    np.testing.assert_array_equal(np.fromfile(frame.lidar, 'f4').reshape(-1, 5), points)
    images = [c.image.read_bytes() for c in frame.cameras]
    np.testing.assert_array_equal(points, generated_frame(tmp_path).points)
    assert images == [c.image.read_bytes() for c in frame.cameras]


def test_the_points_of_a_generated_frame_lie_in_its_images_on_what_they_were_cast_at(tmp_path):
    cv2 = pytest.importorskip('cv2')
    from q3d_plugin.toy_nuscenes import camera

    frame = generated_frame(tmp_path, count=4000)
    assert len(frame.cameras) == 6
    hits = []
    for one in frame.cameras:
        image = cv2.cvtColor(cv2.imread(str(one.image)), cv2.COLOR_BGR2RGB).astype(int)
        local = frame.points[:, :3] @ one.from_lidar[:3, :3].T + one.from_lidar[:3, 3]
        local = local[local[:, 2] > 1]
        pixels = local @ one.intrinsic.T
        u, v = np.round(pixels[:, :2] / pixels[:, 2:]).astype(int).T
        inside = (u >= 0) & (u < image.shape[1]) & (v >= 0) & (v < image.shape[0])
        assert inside.sum() > 100
        hits.append(np.abs(image[v[inside], u[inside]] - camera.SKY).max(1) > 20)
    # The LiDAR looks over a few edges that hide the sky from a camera below it.
    assert np.concatenate(hits).mean() > 0.99
