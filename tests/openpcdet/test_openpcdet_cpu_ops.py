"""The CPU operators for OpenPCDet against shapely, brute force and loops."""

import math

import numpy as np
import pytest
import torch

from q3d_plugin.openpcdet import cpu_ops

shapely_geometry = pytest.importorskip('shapely.geometry')


def polygon(box):
    x, y, _, dx, dy, _, heading = (float(v) for v in box)
    cos, sin = math.cos(heading), math.sin(heading)
    corners = [(sx * dx / 2, sy * dy / 2) for sx, sy in ((1, 1), (-1, 1), (-1, -1), (1, -1))]
    return shapely_geometry.Polygon([(x + cos * a - sin * b, y + sin * a + cos * b) for a, b in corners])


def true_overlap(a, b):
    return np.array([[polygon(p).intersection(polygon(q)).area for q in b] for p in a])


def true_iou(a, b):
    overlap = true_overlap(a, b)
    area_a = np.array([float(p[3] * p[4]) for p in a])[:, None]
    area_b = np.array([float(q[3] * q[4]) for q in b])[None]
    return overlap / np.maximum(area_a + area_b - overlap, 1e-8)


def random_boxes(count, spread=8.0):
    boxes = torch.rand(count, 7, dtype=torch.float64)
    boxes[:, :3] = (boxes[:, :3] - 0.5) * spread
    boxes[:, 3:6] = boxes[:, 3:6] * 5 + 0.3
    boxes[:, 6] = (boxes[:, 6] - 0.5) * 4 * math.pi
    return boxes


def overlap(a, b):
    out = torch.full((len(a), len(b)), float('nan'), dtype=torch.float64)
    assert cpu_ops.boxes_overlap_bev_gpu(a, b, out) == 1
    return out.numpy()


def iou(a, b):
    out = torch.full((len(a), len(b)), float('nan'), dtype=torch.float64)
    cpu_ops.boxes_iou_bev_gpu(a, b, out)
    return out.numpy()


def box(x=0.0, y=0.0, dx=4.0, dy=2.0, heading=0.0):
    return torch.tensor([[x, y, 0.0, dx, dy, 1.5, heading]], dtype=torch.float64)


def test_overlap_and_iou_of_random_boxes():
    a, b = random_boxes(60), random_boxes(50)
    expected = true_overlap(a, b)
    assert (expected > 0).mean() > 0.2 and (expected == 0).mean() > 0.2
    np.testing.assert_allclose(overlap(a, b), expected, atol=1e-9)
    np.testing.assert_allclose(iou(a, b), true_iou(a, b), atol=1e-9)


def test_float32_boxes_far_from_the_origin():
    a, b = random_boxes(30).float(), random_boxes(30).float()
    a[:, :2] += 50
    b[:, :2] += 50
    out = torch.zeros(30, 30)
    cpu_ops.boxes_iou_bev_gpu(a, b, out)
    np.testing.assert_allclose(out.numpy(), true_iou(a, b), atol=1e-5)


@pytest.mark.parametrize(
    ('a', 'b', 'expected'),
    [
        (box(), box(), 8.0),  # identical
        (box(heading=0.7), box(heading=0.7), 8.0),
        (box(heading=0.7), box(heading=0.7 + math.pi), 8.0),
        (box(), box(heading=math.pi / 2), 4.0),  # a cross
        (box(), box(x=4.0), 0.0),  # touching by a side
        (box(), box(x=4.0, y=2.0), 0.0),  # touching by a corner
        (box(), box(x=2.0), 4.0),
        (box(), box(dx=1.0, dy=0.5, heading=0.3), 0.5),  # contained
        (box(dx=1.0, dy=0.5, heading=0.3), box(), 0.5),
        (box(), box(x=20.0), 0.0),  # apart
        (box(dx=2.0, dy=2.0), box(dx=2.0, dy=2.0, heading=math.pi / 4), 8 * (math.sqrt(2) - 1)),  # an octagon
        (box(dx=0.0), box(), 0.0),  # no area
        (box(dx=0.0, dy=0.0), box(), 0.0),
        (box(dx=0.0, dy=0.0), box(dx=0.0, dy=0.0), 0.0),
        (box(dx=1e-7, dy=1e-7), box(), 1e-14),
    ],
)
def test_special_pairs(a, b, expected):
    assert overlap(a, b)[0, 0] == pytest.approx(expected, abs=1e-9)
    union = float(a[0, 3] * a[0, 4] + b[0, 3] * b[0, 4]) - expected
    assert iou(a, b)[0, 0] == pytest.approx(expected / max(union, 1e-8), abs=1e-6)


@pytest.mark.parametrize('turn', np.linspace(0, 2 * math.pi, 25))
def test_aligned_neighbours_at_any_heading(turn):
    """Shared sides are where rounding could flip an edge from inside to outside."""
    shifts = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0], [0.0, 1.0], [0.0, 2.0], [2.0, 1.0]]).double()
    cos, sin = math.cos(turn), math.sin(turn)
    boxes = box(heading=turn).repeat(len(shifts), 1)
    boxes[:, 0] += shifts[:, 0] * cos - shifts[:, 1] * sin
    boxes[:, 1] += shifts[:, 0] * sin + shifts[:, 1] * cos
    np.testing.assert_allclose(overlap(boxes[:1], boxes)[0], [8, 4, 0, 4, 0, 2], atol=1e-9)


def test_pairs():
    a, b = random_boxes(40, spread=3), random_boxes(40, spread=3)
    out = torch.zeros(40, 1, dtype=torch.float64)
    for operator, expected in (
        (cpu_ops.paired_boxes_overlap_bev_gpu, true_overlap(a, b)),
        (cpu_ops.boxes_aligned_overlap_bev_gpu, true_overlap(a, b)),
        (cpu_ops.boxes_aligned_iou_bev_cpu, true_iou(a, b)),
    ):
        operator(a, b, out)
        np.testing.assert_allclose(out[:, 0].numpy(), expected.diagonal(), atol=1e-9)


def test_no_boxes():
    assert overlap(random_boxes(0), random_boxes(3)).shape == (0, 3)
    keep = torch.zeros(0, dtype=torch.long)
    assert cpu_ops.nms_gpu(random_boxes(0), keep, 0.2) == 0
    assert cpu_ops.nms_normal_gpu(random_boxes(0), keep, 0.2) == 0
    assert cpu_ops.boxes_aligned_overlap_bev_gpu(random_boxes(0), random_boxes(0), torch.zeros(0, 1)) == 1


def greedy(matrix, threshold):
    kept = []
    for i in range(len(matrix)):
        if all(matrix[j, i] <= threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize('threshold', [0.01, 0.2, 0.7])
@pytest.mark.parametrize('spread', [6.0, 30.0])
def test_rotated_nms(threshold, spread):
    boxes = random_boxes(120, spread)
    boxes[60:90] = boxes[:30] + torch.randn(30, 7, dtype=torch.float64) * 0.05  # near duplicates
    keep = torch.full((120,), -7, dtype=torch.long)
    count = cpu_ops.nms_gpu(boxes, keep, threshold)
    assert keep[:count].tolist() == greedy(true_iou(boxes, boxes), threshold)
    assert (keep[count:] == -7).all()


def test_nms_without_rotation():
    boxes = random_boxes(100)
    upright = boxes.clone()
    upright[:, 6] = 0
    keep = torch.zeros(100, dtype=torch.long)
    count = cpu_ops.nms_normal_gpu(boxes, keep, 0.2)
    assert keep[:count].tolist() == greedy(true_iou(upright, upright), 0.2)
    assert 0 < count < 100


def test_boxes_that_are_not_numbers_suppress_nothing():
    boxes = torch.cat([box(), box(x=float('nan')), box(x=0.1)])
    keep = torch.zeros(3, dtype=torch.long)
    with np.errstate(invalid='ignore'):
        count = cpu_ops.nms_gpu(boxes, keep, 0.2)
    assert keep[:count].tolist() == [0, 1]


def brute_force_inside(points, boxes, margin):
    result = np.zeros((len(boxes), len(points)), dtype=int)
    for i, b in enumerate(boxes.tolist()):
        for j, p in enumerate(points.tolist()):
            shift = complex(p[0] - b[0], p[1] - b[1]) * complex(math.cos(b[6]), -math.sin(b[6]))
            result[i, j] = (
                abs(p[2] - b[2]) <= b[5] / 2
                and abs(shift.real) < b[3] / 2 + margin
                and abs(shift.imag) < b[4] / 2 + margin
            )
    return result


def test_points_in_boxes_cpu():
    boxes, points = random_boxes(12).float(), (torch.rand(400, 3) - 0.5) * 10
    out = torch.zeros(12, 400, dtype=torch.int)
    cpu_ops.points_in_boxes_cpu(boxes, points, out)
    expected = brute_force_inside(points, boxes, 1e-2)
    assert 0 < expected.sum() < expected.size / 2
    np.testing.assert_array_equal(out.numpy(), expected)


def test_points_in_boxes_gpu_names_the_first_box():
    boxes, points = random_boxes(24).float().view(2, 12, 7), (torch.rand(2, 300, 3) - 0.5) * 10
    out = torch.full((2, 300), -1, dtype=torch.int)
    cpu_ops.points_in_boxes_gpu(boxes, points, out)
    several = 0
    for frame in range(2):
        inside = brute_force_inside(points[frame], boxes[frame], 1e-5)
        several += (inside.sum(0) > 1).sum()
        expected = np.where(inside.any(0), inside.argmax(0), -1)
        np.testing.assert_array_equal(out[frame].numpy(), expected)
    assert several > 0


def scatter_loop(src, index, size, reduce):
    out = torch.zeros(size, src.shape[1])
    for i in range(size):
        if (index == i).any():
            out[i] = reduce(src[index == i])
    return out


@pytest.mark.parametrize('dim_size', [None, 9])
def test_scatter(dim_size):
    src, index = torch.randn(50, 3), torch.randint(0, 6, (50,))
    index[index == 2] = 3  # an index that is not used
    size = dim_size or int(index.max()) + 1
    for function, reduce in (
        (cpu_ops.scatter_sum, lambda rows: rows.sum(0)),
        (cpu_ops.scatter_mean, lambda rows: rows.mean(0)),
        (lambda *a, **k: cpu_ops.scatter_max(*a, **k)[0], lambda rows: rows.max(0).values),
    ):
        got = function(src, index, dim=0, dim_size=dim_size)
        torch.testing.assert_close(got, scatter_loop(src, index, size, reduce))
        across = function(src.T.contiguous(), index, dim=-1, dim_size=dim_size)
        torch.testing.assert_close(across.T, got)


def test_scatter_max_says_where_and_has_the_gradient_of_a_maximum():
    src = torch.randn(40, 3, requires_grad=True)
    index = torch.randint(0, 5, (40,))
    index[index == 1] = 0
    values, positions = cpu_ops.scatter_max(src, index, dim=0, dim_size=5)
    assert (positions[1] == 40).all() and (values[1] == 0).all()
    used = [0, 2, 3, 4]
    for column in range(3):
        torch.testing.assert_close(src[positions[used, column], column], values[used, column])
        assert (index[positions[used, column]] == torch.tensor(used)).all()
    upstream = torch.randn(5, 3)
    values.backward(upstream)
    expected = torch.zeros_like(src)
    for row in used:
        for column in range(3):
            expected[positions[row, column], column] = upstream[row, column]
    torch.testing.assert_close(src.grad, expected)


def test_scatter_refuses_out():
    with pytest.raises(NotImplementedError, match='no out='):
        cpu_ops.scatter_mean(torch.zeros(2), torch.zeros(2, dtype=torch.long), out=torch.zeros(1))
