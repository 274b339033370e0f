"""Metrics of both frameworks in one form: mAP, NDS, AP by class, and everything that was reported."""

from collections.abc import Mapping
from numbers import Number
from typing import Any, Dict, List, Optional

__all__ = ['summarize']


def summarize(found: Mapping[str, Any], per_class: Optional[Mapping[str, float]] = None) -> Dict[str, Any]:
    """Brings what a framework's evaluation reported into one form.

    Args:
        found: Metrics by name; MMDetection3D puts the name of the evaluator before them.
        per_class: AP by class, averaged over thresholds. Where None, it is averaged from entries such as
            ``car_AP_dist_0.5`` of ``found``.

    Returns:
        dict: ``mAP`` and ``NDS`` (None where the metric has none), ``AP`` by class, and all numbers under
        ``all``.

    Examples:
        >>> summarize({'a/mAP': 0.5, 'a/car_AP_dist_0.5': 0.25, 'a/car_AP_dist_1.0': 0.5})['AP']
        {'car': 0.375}
    """
    short = {k.rsplit('/', 1)[-1]: v for k, v in found.items()}
    if per_class is None:
        groups: Dict[str, List[float]] = {}
        for key, value in short.items():
            if '_AP_dist_' in key:
                groups.setdefault(key.split('_AP_dist_')[0], []).append(float(value))
        per_class = {name: sum(values) / len(values) for name, values in groups.items()}
    return {
        'mAP': short.get('mAP'),
        'NDS': short.get('NDS'),
        'AP': {k: float(v) for k, v in per_class.items()},
        'all': {k: float(v) for k, v in found.items() if isinstance(v, Number)},
    }
