"""BEVFusion's operators against loops over points, and their gradients against numerical ones."""

import math

import pytest
import torch

from q3d_plugin import bev_ops

SIZE, AREA = [0.5, 0.4, 1.0], [-2.0, -2.0, -1.0, 2.0, 2.0, 3.0]
GRID = (8, 10, 4)


def intervals(coordinates, batch, depth, width):
    """Sorts cells as the callers of the extension do; returns the order, lengths and starts."""
    ranks = (
        coordinates[:, 0] * (width * depth * batch)
        + coordinates[:, 1] * (depth * batch)
        + coordinates[:, 2] * batch
        + coordinates[:, 3]
    )
    order = ranks.argsort()
    _, lengths = torch.unique_consecutive(ranks[order], return_counts=True)
    return order, lengths.int(), (lengths.cumsum(0) - lengths).int()


class BevPool(torch.autograd.Function):
    """The extension's two functions as one operator, as its callers make it."""

    @staticmethod
    def forward(ctx, x, *rest):
        ctx.rest = rest
        return bev_ops.bev_pool_forward(x, *rest)

    @staticmethod
    def backward(ctx, gradient):
        return (bev_ops.bev_pool_backward(gradient.contiguous(), *ctx.rest), *[None] * len(ctx.rest))


def pooling(rows=200, sizes=(2, 2, 3, 4), channels=3, dtype=torch.float64):
    batch, depth, height, width = sizes
    coordinates = torch.stack([torch.randint(n, (rows,)) for n in (height, width, depth, batch)], 1)
    order, lengths, starts = intervals(coordinates, batch, depth, width)
    x = torch.randn(rows, channels, dtype=dtype)
    return x, (coordinates[order].int(), lengths, starts, *sizes)


def test_pooling_adds_up_the_rows_of_each_cell():
    x, rest = pooling()
    out = bev_ops.bev_pool_forward(x, *rest)
    expected = torch.zeros(2, 2, 3, 4, 3, dtype=torch.float64)
    for row, (i, j, k, b) in zip(x, rest[0].tolist()):
        expected[b, k, i, j] += row
    torch.testing.assert_close(out, expected)
    assert (out == 0).all(-1).sum() < 4  # the cells are hit, most of them several times


def test_gradient_of_pooling():
    x, rest = pooling(rows=40)
    assert torch.autograd.gradcheck(lambda x: BevPool.apply(x, *rest), x.requires_grad_())


def test_pooling_of_nothing_and_sizes_that_are_tensors():
    x, rest = pooling(rows=0)
    sizes = [torch.tensor(n) for n in rest[3:]]  # as MMDetection3D hands them over
    out = bev_ops.bev_pool_forward(x, *rest[:3], *sizes)
    assert out.shape == (2, 2, 3, 4, 3) and not out.any()
    assert bev_ops.bev_pool_backward(torch.ones_like(out), *rest[:3], *sizes).shape == (0, 3)


def test_pooling_gives_the_same_bits_in_every_run():
    x, rest = pooling(rows=5000, sizes=(1, 1, 4, 4), channels=8, dtype=torch.float32)
    first = bev_ops.bev_pool_forward(x, *rest)
    assert all(torch.equal(first, bev_ops.bev_pool_forward(x, *rest)) for _ in range(5))


def cloud(count=300, features=4):
    """Points of which some lie outside of the area, and some on its borders."""
    points = torch.rand(count, features) * 5 - 2.5
    points[:8, :3] = torch.tensor(AREA[:3])
    points[8:16, :3] = torch.tensor(AREA[3:])
    return points[torch.randperm(count)]


def voxel_of(point):
    """The voxel x, y, z of a point; None outside of the area."""
    single = torch.float32
    found = []
    for value, size, low, cells in zip(point[:3], SIZE, AREA, GRID):
        size, low = torch.tensor(size, dtype=single), torch.tensor(low, dtype=single)
        found.append(math.floor(float((value - low) / size)))
        if not 0 <= found[-1] < cells:
            return None
    return tuple(found)


def slow_hard_voxelize(points, max_points, max_voxels):
    voxels = {}
    for point in points:
        cell = voxel_of(point)
        if cell is None or (cell not in voxels and len(voxels) >= max_voxels):
            continue
        members = voxels.setdefault(cell, [])
        if len(members) < max_points:
            members.append(point)
    return voxels


def hard_voxelize(points, max_points, max_voxels, deterministic=True):
    """As ``Voxelization`` of ``projects/BEVFusion`` calls it."""
    voxels = points.new_zeros(max_voxels, max_points, points.shape[1])
    coordinates = points.new_zeros(max_voxels, 3, dtype=torch.int)
    counts = points.new_zeros(max_voxels, dtype=torch.int)
    where = SIZE, AREA, max_points, max_voxels, 3, deterministic
    found = bev_ops.hard_voxelize(points, voxels, coordinates, counts, *where)
    return voxels[:found], coordinates[:found], counts[:found]


@pytest.mark.parametrize(('max_points', 'max_voxels'), [(10, 1000), (2, 1000), (2, 40), (1, 1)])
@pytest.mark.parametrize('deterministic', [True, False])
def test_hard_voxelization(max_points, max_voxels, deterministic):
    points = torch.cat([cloud(), cloud(100)[:, :4] * 0.3])
    expected = slow_hard_voxelize(points, max_points, max_voxels)
    voxels, coordinates, counts = hard_voxelize(points, max_points, max_voxels, deterministic)
    assert [tuple(c) for c in coordinates.tolist()] == list(expected)
    for voxel, count, members in zip(voxels, counts.tolist(), expected.values()):
        assert count == len(members)
        assert torch.equal(voxel[:count], torch.stack(members)) and not voxel[count:].any()
    if max_points == 2 and max_voxels == 1000:
        assert (counts == 2).any() and len(counts) > 40


@pytest.mark.parametrize('points', [torch.zeros(0, 4), torch.full((5, 4), 99.0)])
def test_voxelization_of_no_points(points):
    voxels, coordinates, counts = hard_voxelize(points, 3, 7)
    assert len(voxels) == len(coordinates) == len(counts) == 0
    dynamic = torch.zeros(len(points), 3, dtype=torch.int)
    bev_ops.dynamic_voxelize(points, dynamic, SIZE, AREA, 3)
    assert (dynamic == -1).all()


def test_dynamic_voxelization():
    points = cloud()
    coordinates = torch.zeros(len(points), 3, dtype=torch.int)
    bev_ops.dynamic_voxelize(points, coordinates, SIZE, AREA, 3)
    expected = [voxel_of(point) or (-1, -1, -1) for point in points]
    assert [tuple(c) for c in coordinates.tolist()] == expected
    assert (-1, -1, -1) in expected and len(set(expected)) > 100


class Scatter(torch.autograd.Function):
    """The extension's two functions as one operator, as ``dynamic_scatter`` makes it."""

    @staticmethod
    def forward(ctx, features, coordinates, reduction):
        reduced, voxels, index, counts = bev_ops.dynamic_point_to_voxel_forward(
            features, coordinates, reduction
        )
        ctx.save_for_backward(features, reduced, index, counts)
        ctx.reduction = reduction
        return reduced

    @staticmethod
    def backward(ctx, gradient):
        out = torch.full_like(ctx.saved_tensors[0], 7.0)
        bev_ops.dynamic_point_to_voxel_backward(out, gradient, *ctx.saved_tensors, ctx.reduction)
        return out, None, None


@pytest.mark.parametrize('reduction', ['sum', 'mean', 'max'])
def test_points_of_a_voxel_reduced_to_one(reduction):
    features = torch.randn(60, 3, dtype=torch.float64)
    coordinates = torch.randint(-1, 3, (60, 3))
    reduced, voxels, index, counts = bev_ops.dynamic_point_to_voxel_forward(features, coordinates, reduction)
    groups = {}
    for row, cell in zip(features, coordinates.tolist()):
        if min(cell) >= 0:
            groups.setdefault(tuple(cell), []).append(row)
    assert [tuple(v) for v in voxels.tolist()] == sorted(groups)
    for i, cell in enumerate(sorted(groups)):
        rows = torch.stack(groups[cell])
        expected = rows.amax(0) if reduction == 'max' else getattr(rows, reduction)(0)
        torch.testing.assert_close(reduced[i], expected)
        assert counts[i] == len(rows)
    for cell, place in zip(coordinates.tolist(), index.tolist()):
        assert (place == -1) if min(cell) < 0 else (voxels[place].tolist() == cell)
    features.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: Scatter.apply(f, coordinates, reduction), features)


def test_the_first_of_equal_maxima_gets_the_gradient():
    features = torch.tensor([[1.0], [2.0], [2.0]], requires_grad=True)
    Scatter.apply(features, torch.zeros(3, 3, dtype=torch.long), 'max').sum().backward()
    assert features.grad.flatten().tolist() == [0.0, 1.0, 0.0]


def test_nothing_reduced():
    features, coordinates = torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.long)
    reduced, voxels, index, counts = bev_ops.dynamic_point_to_voxel_forward(features, coordinates, 'max')
    assert reduced.shape == voxels.shape == (0, 3) and len(index) == len(counts) == 0
    outside = -torch.ones(4, 3, dtype=torch.long)
    reduced, _, index, _ = bev_ops.dynamic_point_to_voxel_forward(torch.ones(4, 2), outside, 'mean')
    assert reduced.shape == (0, 2) and index.tolist() == [-1] * 4
    out = torch.ones(4, 2)
    bev_ops.dynamic_point_to_voxel_backward(out, reduced, torch.ones(4, 2), reduced, index, index[:0], 'mean')
    assert not out.any()
