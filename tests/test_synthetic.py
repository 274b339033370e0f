"""Generated points lie where they should, and are always the same."""

import numpy as np

from q3d_plugin.synthetic import camera_ring, synthetic_points


def test_points_are_inside_of_the_area():
    points = synthetic_points([0, -40, -3, 70, 40, 1], 5, 1000)
    assert points.shape == (1000, 5) and points.dtype.name == 'float32'
    for axis, (low, high) in enumerate([(0, 70), (-40, 40), (-3, 1)]):
        assert low < points[:, axis].min() < points[:, axis].max() < high
    np.testing.assert_array_equal(points, synthetic_points([0, -40, -3, 70, 40, 1], 5, 1000))


def test_cameras_of_a_ring_see_what_is_before_them_in_the_middle_and_nothing_else_there():
    ring = camera_ring((100, 200), 6)
    angles = 2 * np.pi * np.arange(6) / 6
    ahead = np.stack([10 * np.cos(angles), 10 * np.sin(angles), np.zeros(6), np.ones(6)], 1)
    for i in range(6):
        u, v, depth, _ = ring.lidar2img[i] @ ahead.T
        np.testing.assert_allclose(depth, 10 * np.cos(angles - angles[i]), atol=1e-5)
        assert abs(u[i] / depth[i] - 100) < 1e-3 and abs(v[i] / depth[i] - 50) < 1e-3
        np.testing.assert_allclose(ring.cam2lidar[i] @ ring.lidar2cam[i], np.eye(4), atol=1e-6)
        np.testing.assert_allclose(ring.intrinsics[i] @ ring.lidar2cam[i], ring.lidar2img[i], atol=1e-4)
    # To the left is the left half of the image that looks ahead, and up is its upper half.
    u, v, depth, _ = ring.lidar2img[0] @ np.array([10, 1, 1, 1])
    assert u / depth < 100 and v / depth < 50
