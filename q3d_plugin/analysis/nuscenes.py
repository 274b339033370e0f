"""A run's detections by way of the nuScenes devkit, and their AP by distance."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from q3d_plugin.errors import Q3DError

__all__ = ['RINGS', 'Detections', 'ap_by_distance']

RINGS = ((0.0, 20.0), (20.0, 40.0), (40.0, float('inf')))
"""Distances from the vehicle in metres: from, up to."""
_SETS = {'v1.0-mini': 'mini_val', 'v1.0-trainval': 'val'}


class Detections:
    """Detections and ground truth of the validation set, as the devkit's evaluation reads and filters them.

    Args:
        results: ``results_nusc.json``.
        data_root: Folder of the data set.
        version: ``'v1.0-mini'`` or ``'v1.0-trainval'``.
        nusc: The data set, where the devkit has read it already.

    Raises:
        Q3DError: The devkit is missing, or the files do not go together.
    """

    def __init__(self, results: Path, data_root: str, version: str, nusc: Any = None) -> None:
        try:
            from nuscenes import NuScenes
            from nuscenes.eval.common.loaders import (
                add_center_dist,
                filter_eval_boxes,
                load_gt,
                load_prediction,
            )
            from nuscenes.eval.detection.config import config_factory
            from nuscenes.eval.detection.data_classes import DetectionBox
        except ImportError as error:
            raise Q3DError(f'nuScenes needs its devkit: pip install nuscenes-devkit ({error})') from error
        if version not in _SETS:
            raise Q3DError(f'version {version!r} of nuScenes has no ground truth to compare with')
        if not (Path(data_root) / version).is_dir():
            raise Q3DError(f'data set {data_root!r} has no folder {version}; name it by --data-root')
        self.config = config_factory('detection_cvpr_2019')
        try:
            self.nusc = nusc or NuScenes(version=version, dataroot=str(data_root), verbose=False)
            limit = self.config.max_boxes_per_sample
            predicted, _ = load_prediction(str(results), limit, DetectionBox, verbose=False)
            truth = load_gt(self.nusc, _SETS[version], DetectionBox, verbose=False)
        except (AssertionError, KeyError, OSError, ValueError) as error:
            raise Q3DError(f'{str(results)!r} does not go with {data_root!r}: {error}') from error
        if set(predicted.sample_tokens) != set(truth.sample_tokens):
            raise Q3DError(f'{str(results)!r} is of other frames than the validation set of {data_root!r}')
        ranges = self.config.class_range
        self.predicted = filter_eval_boxes(self.nusc, add_center_dist(self.nusc, predicted), ranges)
        self.truth = filter_eval_boxes(self.nusc, add_center_dist(self.nusc, truth), ranges)


def ap_by_distance(
    detections: Detections, rings: Sequence[Tuple[float, float]] = RINGS
) -> Dict[str, List[Optional[float]]]:
    """AP of every class, with ground truth and detections of one ring of distances at a time.

    The matching is the devkit's: nearest centre on the ground, mean over the four thresholds of its config.

    Args:
        detections: Of a run.
        rings: Distances in metres: from, up to.

    Returns:
        dict: Class -> AP by ring; None where a ring has no ground truth of the class. Under ``'mean'`` the
        means over the classes that have one.
    """
    from nuscenes.eval.common.data_classes import EvalBoxes
    from nuscenes.eval.common.utils import center_distance
    from nuscenes.eval.detection.algo import accumulate, calc_ap

    config, out = detections.config, {}

    def inside(boxes, low: float, high: float):
        kept = EvalBoxes()
        for token in boxes.sample_tokens:
            kept.add_boxes(token, [b for b in boxes[token] if low <= b.ego_dist < high])
        return kept

    for name in config.class_names:
        out[name] = []
    for low, high in rings:
        truth, predicted = inside(detections.truth, low, high), inside(detections.predicted, low, high)
        present = {b.detection_name for b in truth.all}
        for name in config.class_names:
            if name not in present:
                out[name].append(None)
                continue
            found = [
                calc_ap(
                    accumulate(truth, predicted, name, center_distance, threshold),
                    config.min_recall,
                    config.min_precision,
                )
                for threshold in config.dist_ths
            ]
            out[name].append(float(np.mean(found)))
    known = [[v[i] for v in out.values() if v[i] is not None] for i in range(len(rings))]
    out['mean'] = [float(np.mean(values)) if values else None for values in known]
    return out
