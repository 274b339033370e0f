"""CPU versions of OpenPCDet's compiled operators, with the signatures of its extension modules.

Boxes are ``(x, y, z, dx, dy, dz, heading)``, as everywhere in OpenPCDet. Each operator fills the output
tensor it is given, like the extension does. Overlaps are exact: the compiled kernels widen each box by a
centimetre when they collect corners, so that figures may differ in the third digit.
"""

from typing import Optional, Tuple

import numpy as np
import torch

from q3d_plugin.bev_ops import BEV_POOL

__all__ = [
    'EXTENSIONS',
    'SCATTER',
    'boxes_aligned_iou_bev_cpu',
    'boxes_aligned_overlap_bev_gpu',
    'boxes_iou_bev_cpu',
    'boxes_iou_bev_gpu',
    'boxes_overlap_bev_gpu',
    'nms_gpu',
    'nms_normal_gpu',
    'paired_boxes_overlap_bev_gpu',
    'points_in_boxes_cpu',
    'points_in_boxes_gpu',
    'scatter_max',
    'scatter_mean',
    'scatter_sum',
]

# Pairs whose polygons are clipped at once: bounds the memory, and keeps it in the cache.
_CHUNK = 1 << 14
# The kernels divide by at least this much, so that boxes without an area have an IoU of 0.
_EPS = 1e-8
# How far outside of a box's sides a point still counts as inside, in metres: the two kernels differ.
_MARGIN_CPU, _MARGIN_GPU = 1e-2, 1e-5


def _numpy(boxes: torch.Tensor) -> np.ndarray:
    return boxes.detach().cpu().numpy().astype(np.float64)


def _clip(polygons: np.ndarray, axis: int, side: np.ndarray, sign: float) -> np.ndarray:
    """Cuts convex polygons by one half-plane each: what has ``sign * coordinate[axis] <= side``.

    Args:
        polygons: Vertices in order, (K, V, 2); vertices may repeat.
        axis: The coordinate that is bounded.
        side: The bounds, (K,).
        sign: 1 for an upper bound, -1 for a lower one.

    Returns:
        np.ndarray: (K, V + 2, 2). The last vertex repeats where less are left; all are 0 where none is.
    """
    depth = side[:, None] - sign * polygons[..., axis]
    following, next_depth = np.roll(polygons, -1, axis=1), np.roll(depth, -1, axis=1)
    inside, next_inside = depth >= 0, next_depth >= 0
    crosses = inside != next_inside
    span = np.where(crosses, depth - next_depth, 1.0)
    cut = polygons + (depth / span)[..., None] * (following - polygons)

    # Each edge gives up to two vertices: where it crosses the line, then its end.
    count, slots = len(polygons), polygons.shape[1]
    found = np.stack([cut, following], axis=2).reshape(count, 2 * slots, 2)
    valid = np.stack([crosses, next_inside], axis=2).reshape(count, 2 * slots)
    order = np.argsort(~valid, axis=1, kind='stable')[:, : slots + 2]
    left = valid.sum(axis=1)
    position = np.minimum(np.arange(order.shape[1])[None], np.maximum(left - 1, 0)[:, None])
    order = np.take_along_axis(order, position, axis=1)
    result = np.take_along_axis(found, order[..., None], axis=1)
    return np.where((left > 0)[:, None, None], result, 0.0)


def _overlap_of_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Area of the intersection of box ``a[k]`` with box ``b[k]``, seen from above: (K,)."""
    # In the frame of b, where b is axis-aligned: the corners of a are cut by b's four sides.
    angle = a[:, 6] - b[:, 6]
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    half_x = a[:, 3:4] / 2 * np.array([[1, -1, -1, 1]])
    half_y = a[:, 4:5] / 2 * np.array([[1, 1, -1, -1]])
    shift = a[:, :2] - b[:, :2]
    cos_b, sin_b = np.cos(b[:, 6]), np.sin(b[:, 6])
    x = half_x * cos - half_y * sin + (shift[:, 0] * cos_b + shift[:, 1] * sin_b)[:, None]
    y = half_x * sin + half_y * cos + (shift[:, 1] * cos_b - shift[:, 0] * sin_b)[:, None]
    polygons = np.stack([x, y], axis=-1)
    for axis in (0, 1):
        for sign in (1.0, -1.0):
            polygons = _clip(polygons, axis, b[:, 3 + axis] / 2, sign)
    x, y = polygons[..., 0], polygons[..., 1]
    return np.abs((x * np.roll(y, -1, axis=1) - np.roll(x, -1, axis=1) * y).sum(axis=1)) / 2


def _overlap(a: np.ndarray, b: np.ndarray, later_only: bool = False) -> np.ndarray:
    """Intersection of every box of ``a`` with every box of ``b``, seen from above: (N, M).

    With ``later_only``, only pairs whose second index is the larger one are looked at.
    """
    result = np.zeros((len(a), len(b)))
    reach = np.hypot(a[:, 3], a[:, 4])[:, None] / 2 + np.hypot(b[:, 3], b[:, 4])[None] / 2
    near = ((a[:, None, :2] - b[None, :, :2]) ** 2).sum(-1) <= reach**2
    rows, columns = np.nonzero(np.triu(near, 1) if later_only else near)
    for start in range(0, len(rows), _CHUNK):
        i, j = rows[start : start + _CHUNK], columns[start : start + _CHUNK]
        result[i, j] = _overlap_of_pairs(a[i], b[j])
    return result


def _iou(overlap: np.ndarray, area_a: np.ndarray, area_b: np.ndarray) -> np.ndarray:
    return overlap / np.maximum(area_a + area_b - overlap, _EPS)


def _area(boxes: np.ndarray) -> np.ndarray:
    return boxes[:, 3] * boxes[:, 4]


def _fill(out: torch.Tensor, values: np.ndarray) -> int:
    out.copy_(torch.from_numpy(values).to(out.dtype).view(out.shape))
    return 1


def boxes_overlap_bev_gpu(boxes_a: torch.Tensor, boxes_b: torch.Tensor, out: torch.Tensor) -> int:
    """Fills ``out`` (N, M) with the areas in which the boxes overlap, seen from above."""
    return _fill(out, _overlap(_numpy(boxes_a), _numpy(boxes_b)))


def boxes_iou_bev_gpu(boxes_a: torch.Tensor, boxes_b: torch.Tensor, out: torch.Tensor) -> int:
    """Fills ``out`` (N, M) with the IoU of every box with every other, seen from above."""
    a, b = _numpy(boxes_a), _numpy(boxes_b)
    return _fill(out, _iou(_overlap(a, b), _area(a)[:, None], _area(b)[None]))


def paired_boxes_overlap_bev_gpu(boxes_a: torch.Tensor, boxes_b: torch.Tensor, out: torch.Tensor) -> int:
    """Fills ``out`` (N, 1) with the overlap of each box with its partner, seen from above."""
    return _fill(out, _overlap_of_pairs(_numpy(boxes_a), _numpy(boxes_b)))


def boxes_aligned_iou_bev_cpu(boxes_a: torch.Tensor, boxes_b: torch.Tensor, out: torch.Tensor) -> int:
    """Fills ``out`` (N, 1) with the IoU of each box with its partner, seen from above."""
    a, b = _numpy(boxes_a), _numpy(boxes_b)
    return _fill(out, _iou(_overlap_of_pairs(a, b), _area(a), _area(b)))


boxes_aligned_overlap_bev_gpu = paired_boxes_overlap_bev_gpu
boxes_iou_bev_cpu = boxes_iou_bev_gpu


def _greedy(suppressed_by: np.ndarray, keep: torch.Tensor) -> int:
    """Writes into ``keep`` which boxes stay, where a box that stays removes what it suppresses."""
    alive, kept = np.ones(len(suppressed_by), dtype=bool), []
    for i in range(len(suppressed_by)):
        if alive[i]:
            kept.append(i)
            alive &= ~suppressed_by[i]
    keep[: len(kept)] = torch.as_tensor(kept, dtype=keep.dtype)
    return len(kept)


def nms_gpu(boxes: torch.Tensor, keep: torch.Tensor, threshold: float) -> int:
    """Rotated non-maximum suppression, seen from above.

    Args:
        boxes: (N, 7), best first.
        keep: (N,) integers, whose first entries become the indices of the boxes that stay.
        threshold: A box goes where its IoU with a better one that stays is above this.

    Returns:
        int: How many stay.

    Examples:
        >>> import torch
        >>> boxes = torch.tensor([[0.0, 0, 0, 4, 2, 1, 0], [0.1, 0, 0, 4, 2, 1, 0], [0, 0, 0, 4, 2, 1, 1.57]])
        >>> keep = torch.zeros(3, dtype=torch.long)
        >>> keep[: nms_gpu(boxes, keep, 0.5)]
        tensor([0, 2])
    """
    array = _numpy(boxes)
    area = _area(array)
    iou = _iou(_overlap(array, array, later_only=True), area[:, None], area[None])
    return _greedy(iou > threshold, keep)


def nms_normal_gpu(boxes: torch.Tensor, keep: torch.Tensor, threshold: float) -> int:
    """Like :func:`nms_gpu`, but as if no box were turned."""
    array = _numpy(boxes)
    low, high = array[:, :2] - array[:, 3:5] / 2, array[:, :2] + array[:, 3:5] / 2
    shared = np.minimum(high[:, None], high[None]) - np.maximum(low[:, None], low[None])
    area = _area(array)
    iou = np.triu(_iou(shared.clip(min=0).prod(-1), area[:, None], area[None]), 1)
    return _greedy(iou > threshold, keep)


def _inside(points: torch.Tensor, box: torch.Tensor, margin: float) -> torch.Tensor:
    """Which of the points (N, 3) lie in one box: (N,), bool."""
    shift = points - box[:3]
    cos, sin = torch.cos(box[6]), torch.sin(box[6])
    along = shift[:, 0] * cos + shift[:, 1] * sin
    across = shift[:, 1] * cos - shift[:, 0] * sin
    return (
        (shift[:, 2].abs() <= box[5] / 2)
        & (along.abs() < box[3] / 2 + margin)
        & (across.abs() < box[4] / 2 + margin)
    )


def points_in_boxes_cpu(boxes: torch.Tensor, points: torch.Tensor, out: torch.Tensor) -> int:
    """Fills ``out`` (boxes, points) with 1 where the point (points, 3) lies in the box (boxes, 7), else 0."""
    for row, box in zip(out, boxes):
        row.copy_(_inside(points, box, _MARGIN_CPU))
    return 1


def points_in_boxes_gpu(boxes: torch.Tensor, points: torch.Tensor, out: torch.Tensor) -> int:
    """Fills ``out`` (batch, points) with the first box in which each point lies; -1 stays where none does."""
    for frame_boxes, frame_points, row in zip(boxes, points, out):
        for i in range(len(frame_boxes) - 1, -1, -1):  # backwards, so that the first box wins
            row[_inside(frame_points, frame_boxes[i], _MARGIN_GPU)] = i
    return 1


# Extension module -> what is replaced in it. Whatever else is called there raises NotImplementedError.
EXTENSIONS = {
    'pcdet.ops.iou3d_nms.iou3d_nms_cuda': {
        'boxes_aligned_iou_bev_cpu': boxes_aligned_iou_bev_cpu,
        'boxes_aligned_overlap_bev_gpu': boxes_aligned_overlap_bev_gpu,
        'boxes_iou_bev_cpu': boxes_iou_bev_cpu,
        'boxes_iou_bev_gpu': boxes_iou_bev_gpu,
        'boxes_overlap_bev_gpu': boxes_overlap_bev_gpu,
        'nms_gpu': nms_gpu,
        'nms_normal_gpu': nms_normal_gpu,
        'paired_boxes_overlap_bev_gpu': paired_boxes_overlap_bev_gpu,
    },
    'pcdet.ops.roiaware_pool3d.roiaware_pool3d_cuda': {
        'points_in_boxes_cpu': points_in_boxes_cpu,
        'points_in_boxes_gpu': points_in_boxes_gpu,
    },
    'pcdet.ops.roipoint_pool3d.roipoint_pool3d_cuda': {},
    'pcdet.ops.ingroup_inds.ingroup_inds_cuda': {},
    'pcdet.ops.pointnet2.pointnet2_stack.pointnet2_stack_cuda': {},
    'pcdet.ops.pointnet2.pointnet2_batch.pointnet2_batch_cuda': {},
    'pcdet.ops.bev_pool.bev_pool_ext': BEV_POOL,
}


def _target(
    src: torch.Tensor, index: torch.Tensor, dim: int, dim_size: Optional[int]
) -> Tuple[torch.Tensor, int, list]:
    """The index as wide as ``src``, the dimension counted from the front, and the shape of the result."""
    dim = dim % src.dim()
    if index.dim() == 1:
        index = index.view([-1 if i == dim else 1 for i in range(src.dim())])
    if dim_size is None:
        dim_size = int(index.max()) + 1 if index.numel() else 0
    shape = list(src.shape)
    shape[dim] = dim_size
    return index.expand_as(src), dim, shape


def scatter_sum(
    src: torch.Tensor, index: torch.Tensor, dim: int = -1, out: None = None, dim_size: Optional[int] = None
) -> torch.Tensor:
    """``torch_scatter.scatter_sum``: adds up entries of ``src`` that have the same index along ``dim``."""
    _no_out(out)
    index, dim, shape = _target(src, index, dim, dim_size)
    return src.new_zeros(shape).scatter_add(dim, index, src)


def scatter_mean(
    src: torch.Tensor, index: torch.Tensor, dim: int = -1, out: None = None, dim_size: Optional[int] = None
) -> torch.Tensor:
    """``torch_scatter.scatter_mean``: averages entries with the same index; 0 where an index is not used."""
    _no_out(out)
    index, dim, shape = _target(src, index, dim, dim_size)
    return src.new_zeros(shape).scatter_reduce(dim, index, src, 'mean', include_self=False)


def scatter_max(
    src: torch.Tensor, index: torch.Tensor, dim: int = -1, out: None = None, dim_size: Optional[int] = None
) -> Tuple[torch.Tensor, torch.Tensor]:
    """``torch_scatter.scatter_max``: the largest entry of each index, and where along ``dim`` it stands.

    Returns:
        tuple: Values (0 where an index is not used), and positions (``src.shape[dim]`` there).
    """
    _no_out(out)
    index, dim, shape = _target(src, index, dim, dim_size)
    values = src.new_zeros(shape).scatter_reduce(dim, index, src, 'amax', include_self=False)
    with torch.no_grad():
        length = src.shape[dim]
        steps = torch.arange(length, device=src.device).view(
            [-1 if i == dim else 1 for i in range(src.dim())]
        )
        largest = src == values.gather(dim, index)
        steps = torch.where(largest, steps.expand_as(src), length)
        positions = index.new_full(shape, length).scatter_reduce(dim, index, steps, 'amin')
    return values, positions


def _no_out(out) -> None:
    if out is not None:
        raise NotImplementedError('torch_scatter is not installed, and its stand-in takes no out=')


SCATTER = {
    'scatter_add': scatter_sum,
    'scatter_max': scatter_max,
    'scatter_mean': scatter_mean,
    'scatter_sum': scatter_sum,
}
