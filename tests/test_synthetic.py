"""Generated points lie where they should, and are always the same."""

import numpy as np

from q3d_plugin.synthetic import synthetic_points


def test_points_are_inside_of_the_area():
    points = synthetic_points([0, -40, -3, 70, 40, 1], 5, 1000)
    assert points.shape == (1000, 5) and points.dtype.name == 'float32'
    for axis, (low, high) in enumerate([(0, 70), (-40, 40), (-3, 1)]):
        assert low < points[:, axis].min() < points[:, axis].max() < high
    np.testing.assert_array_equal(points, synthetic_points([0, -40, -3, 70, 40, 1], 5, 1000))
