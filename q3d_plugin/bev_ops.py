"""The compiled operators of BEVFusion as torch operations: pooling of camera features, and voxelization.

They have the signatures of the extensions ``bev_pool_ext`` (MMDetection3D's ``projects/BEVFusion`` and
OpenPCDet) and ``voxel_layer`` (``projects/BEVFusion``), and give the same result in every run.
"""

from typing import List, Sequence, Tuple

import torch
from torch import Tensor

__all__ = [
    'BEV_POOL',
    'VOXEL_LAYER',
    'bev_pool_backward',
    'bev_pool_forward',
    'dynamic_point_to_voxel_backward',
    'dynamic_point_to_voxel_forward',
    'dynamic_voxelize',
    'hard_voxelize',
]


def _cells(coordinates: Tensor, depth: int, height: int, width: int) -> Tensor:
    """Number of the cell (batch, depth, height, width) of coordinates (N, 4) ``x, y, z, batch``."""
    x, y, z, batch = coordinates.long().unbind(1)
    return ((batch * depth + z) * height + x) * width + y


def bev_pool_forward(
    x: Tensor,
    coordinates: Tensor,
    lengths: Tensor,
    starts: Tensor,
    batch: int,
    depth: int,
    height: int,
    width: int,
) -> Tensor:
    """Sums the features of each cell.

    Args:
        x: Features (N, C).
        coordinates: Of their cells, (N, 4) as ``x, y, z, batch``; ``x`` counts along the height.
        lengths: How many rows in a row have one cell (I,); not needed here.
        starts: Where those rows begin (I,); not needed here.
        batch: Number of frames B.
        depth: Number of cells D along z.
        height: Number of cells H along x.
        width: Number of cells W along y.

    Returns:
        Tensor: (B, D, H, W, C).

    Examples:
        >>> x = torch.tensor([[1.0], [2.0], [5.0]])
        >>> cells = torch.tensor([[0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]])
        >>> bev_pool_forward(x, cells, torch.tensor([2, 1]), torch.tensor([0, 2]), 1, 1, 2, 2).flatten()
        tensor([0., 3., 5., 0.])
    """
    batch, depth, height, width = int(batch), int(depth), int(height), int(width)
    out = x.new_zeros(batch * depth * height * width, x.shape[1])
    # Rows of one cell come one after the other, so that every run adds in the same order.
    out.index_add_(0, _cells(coordinates, depth, height, width), x)
    return out.view(batch, depth, height, width, -1)


def bev_pool_backward(
    gradient: Tensor,
    coordinates: Tensor,
    lengths: Tensor,
    starts: Tensor,
    batch: int,
    depth: int,
    height: int,
    width: int,
) -> Tensor:
    """Gradient (N, C) of :func:`bev_pool_forward` for its features: every row gets that of its cell.

    Args:
        gradient: Of the output, (B, D, H, W, C).
        coordinates: As in the forward pass, like everything that follows.
        lengths: Not needed here.
        starts: Not needed here.
        batch: Number of frames B.
        depth: Number of cells D along z.
        height: Number of cells H along x.
        width: Number of cells W along y.
    """
    cells = _cells(coordinates, int(depth), int(height), int(width))
    return gradient.reshape(-1, gradient.shape[-1]).index_select(0, cells)


def _voxels(
    points: Tensor, size: Sequence[float], area: Sequence[float], dimensions: int
) -> Tuple[Tensor, Tensor, Tensor]:
    """Voxel of each point (N, dimensions), whether it lies in the area (N,), and the grid's size."""
    size, area = points.new_tensor(size), points.new_tensor(area)
    grid = torch.round((area[dimensions:] - area[:dimensions]) / size).long()
    voxels = torch.floor((points[:, :dimensions] - area[:dimensions]) / size).long()
    return voxels, ((voxels >= 0) & (voxels < grid)).all(1), grid


def dynamic_voxelize(
    points: Tensor,
    coordinates: Tensor,
    voxel_size: Sequence[float],
    coors_range: Sequence[float],
    dimensions: int = 3,
) -> None:
    """Fills ``coordinates`` (N, 3) with the voxel ``x, y, z`` of each point (N, F), -1 outside of the area.

    Args:
        points: Position and features.
        coordinates: Integers, written to.
        voxel_size: Along x, y and z, in metres.
        coors_range: The area: three minima, then three maxima, in metres.
        dimensions: Number of coordinates.
    """
    voxels, inside, _ = _voxels(points, voxel_size, coors_range, dimensions)
    coordinates.copy_(torch.where(inside[:, None], voxels, -1))


def hard_voxelize(
    points: Tensor,
    voxels: Tensor,
    coordinates: Tensor,
    counts: Tensor,
    voxel_size: Sequence[float],
    coors_range: Sequence[float],
    max_points: int,
    max_voxels: int,
    dimensions: int = 3,
    deterministic: bool = True,
) -> int:
    """Gathers points in voxels, in the order in which their first points come.

    Args:
        points: Position and features (N, F).
        voxels: Zeros (max_voxels, max_points, F), which get the points.
        coordinates: Integers (max_voxels, 3), which get the voxels ``x, y, z``.
        counts: Zeros (max_voxels,), which get the numbers of points.
        voxel_size: Along x, y and z, in metres.
        coors_range: The area: three minima, then three maxima, in metres.
        max_points: Later points of a voxel are left out.
        max_voxels: Later voxels are left out.
        dimensions: Number of coordinates.
        deterministic: Without effect: this is.

    Returns:
        int: Number of voxels.
    """
    found, inside, grid = _voxels(points, voxel_size, coors_range, dimensions)
    rows = inside.nonzero()[:, 0]
    found = found[rows]
    number = found[:, 0]
    for axis in range(1, dimensions):
        number = number * grid[axis] + found[:, axis]
    number, order = torch.sort(number, stable=True)
    _, lengths = torch.unique_consecutive(number, return_counts=True)
    starts = lengths.cumsum(0) - lengths
    # Voxels by their first point; the sort is stable, so the first of a voxel comes first in it.
    first = order[starts]
    rank = torch.empty_like(first)
    rank[torch.argsort(first)] = torch.arange(len(first))
    voxel = rank.repeat_interleave(lengths)
    place = torch.arange(len(number)) - starts.repeat_interleave(lengths)
    kept = (voxel < max_voxels) & (place < max_points)
    voxel, place, rows = voxel[kept], place[kept], order[kept]
    voxels[voxel, place] = points[inside][rows]
    firsts = place == 0
    coordinates[voxel[firsts]] = found[rows[firsts]].to(coordinates.dtype)
    total = min(len(first), max_voxels)
    counts[:total] = torch.bincount(voxel, minlength=total).to(counts.dtype)
    return total


_REDUCTIONS = {'sum': 'sum', 'mean': 'mean', 'max': 'amax'}


def dynamic_point_to_voxel_forward(features: Tensor, coordinates: Tensor, reduction: str) -> List[Tensor]:
    """Reduces the features of all points of a voxel to one row.

    Args:
        features: (N, C).
        coordinates: Voxel of each point (N, 3); points with a negative one are left out.
        reduction: ``'sum'``, ``'mean'`` or ``'max'``.

    Returns:
        list: Features (M, C) and coordinates (M, 3) of the voxels, the voxel of each point (N,), -1 for
        none, and the number of points (M,).
    """
    if not len(features):
        none = coordinates.new_empty(0, dtype=torch.int32)
        return [features.clone(), coordinates.clone(), none, none.clone()]
    clean = coordinates.masked_fill((coordinates < 0).any(1, keepdim=True), -1)
    voxels, index, counts = torch.unique(clean, dim=0, return_inverse=True, return_counts=True)
    if voxels[0, 0] < 0:
        voxels, counts, index = voxels[1:], counts[1:], index - 1
    inside = index >= 0
    where = index[inside][:, None].expand(-1, features.shape[1])
    reduced = features.new_zeros(len(voxels), features.shape[1]).scatter_reduce(
        0, where, features[inside], _REDUCTIONS[reduction], include_self=False
    )
    return [reduced, voxels, index.int(), counts.int()]


def dynamic_point_to_voxel_backward(
    out: Tensor,
    gradient: Tensor,
    features: Tensor,
    reduced: Tensor,
    index: Tensor,
    counts: Tensor,
    reduction: str,
) -> None:
    """Gradient of :func:`dynamic_point_to_voxel_forward` for its features, written into ``out`` (N, C).

    Args:
        out: Overwritten.
        gradient: Of the reduced features, (M, C).
        features: As they were given.
        reduced: The result, (M, C).
        index: Voxel of each point (N,).
        counts: Points of each voxel (M,).
        reduction: As it was given; of several largest points the first one gets the gradient.
    """
    out.zero_()
    rows = (index >= 0).nonzero()[:, 0]
    if not len(rows):
        return
    voxel = index[rows].long()
    passed = gradient[voxel]
    if reduction == 'mean':
        passed = passed / counts[voxel, None].to(passed.dtype)
    elif reduction == 'max':
        number = torch.where(features[rows] == reduced[voxel], rows[:, None], len(features))
        winner = number.new_full(reduced.shape, len(features))
        winner.scatter_reduce_(0, voxel[:, None].expand_as(number), number, 'amin')
        passed = passed * (number == winner[voxel])
    out[rows] = passed


BEV_POOL = {'bev_pool_backward': bev_pool_backward, 'bev_pool_forward': bev_pool_forward}
"""The functions of ``bev_pool_ext``."""
VOXEL_LAYER = {
    'dynamic_point_to_voxel_backward': dynamic_point_to_voxel_backward,
    'dynamic_point_to_voxel_forward': dynamic_point_to_voxel_forward,
    'dynamic_voxelize': dynamic_voxelize,
    'hard_voxelize': hard_voxelize,
}
"""The functions of ``voxel_layer``."""
