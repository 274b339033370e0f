"""Layer by layer: the outputs of a forward pass, recorded and compared with those of another model."""

import collections
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from q3d_plugin.adapter import Adapter
from q3d_plugin.errors import Q3DError
from q3d_plugin.zoo.rows import first_line

__all__ = ['Recorded', 'compare', 'in_double', 'int8_error', 'record', 'sample']

SAMPLE = 1 << 16
"""Of a large tensor about so many elements are kept."""

Sampled = Tuple[Tuple[int, ...], Tensor]
"""Shape of a tensor, and elements of it."""

Recorded = Dict[str, List[List[Sampled]]]
"""For each module the tensors that it returned, call by call."""


def sample(output: Any) -> List[Sampled]:
    """Shape and evenly spaced elements of every floating tensor in what a module returned."""
    if isinstance(output, Tensor):
        if not output.is_floating_point():
            return []
        flat = output.detach().reshape(-1)
        return [(tuple(output.shape), flat[:: max(1, flat.numel() // SAMPLE)].clone())]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [s for item in output for s in sample(item)]
    return sample(output.features) if isinstance(getattr(output, 'features', None), Tensor) else []


def record(adapter: Adapter, model: nn.Module, frame: Any, names: List[str]) -> Tuple[Recorded, str]:
    """Runs the model on the frame, as far as it comes.

    Args:
        adapter: Of the model's framework.
        model: In eval mode.
        frame: A batch; not changed.
        names: Modules whose outputs are recorded.

    Returns:
        tuple: The outputs, and the reason why the model stopped, or ''.
    """
    seen = collections.defaultdict(list)

    def hook(name: str) -> Callable:
        return lambda module, args, output: seen[name].append(sample(output))

    handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in names]
    stopped = ''
    try:
        with torch.no_grad():
            adapter.run(model, copy.deepcopy(frame))
    except Exception as error:
        # What else a quantized model raises, the float one has to raise, too.
        if isinstance(error, Q3DError):
            raise
        stopped = first_line(error)
    finally:
        for handle in handles:
            handle.remove()
    return dict(seen), stopped


def _pairs(expected: Recorded, got: Recorded) -> Iterator[Tuple[str, Optional[Tensor], Optional[Tensor]]]:
    """Tensors of the same call; None where one is missing or has another shape."""
    for name, calls in expected.items():
        flat = [s for call in calls for s in call]
        mine = [s for call in got.get(name, ()) for s in call]
        for a, b in zip(flat, mine):
            yield (name, a[1], b[1]) if a[0] == b[0] else (name, None, None)
        if len(flat) != len(mine):
            yield name, None, None


def compare(expected: Recorded, got: Recorded) -> Tuple[Optional[float], str]:
    """The largest relative difference of any tensor and where it is; infinite where one is missing."""
    worst, where = None, ''
    for name, a, b in _pairs(expected, got):
        if a is None:
            return math.inf, name
        if not a.numel():
            continue
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return math.inf, name
        if not finite.any():
            continue
        scale, difference = a[finite].abs().max().item(), (a - b)[finite].abs().max().item()
        relative = difference / scale if scale else (0.0 if difference == 0 else math.inf)
        if worst is None or relative > worst:
            worst, where = relative, name
    return worst, where


def int8_error(expected: Recorded, got: Recorded) -> Optional[float]:
    """Median over all tensors of the relative L2 error; tensors of other shapes are left out."""
    errors = []
    for _, a, b in _pairs(expected, got):
        if a is not None and a.numel() and a.isfinite().all() and a.norm() > 0:
            errors.append(((a - b).norm() / a.norm()).item())
    return float(np.median(errors)) if errors else None


def in_double(value: Any) -> Any:
    """A frame with every floating tensor in double precision."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: in_double(v) for k, v in value.items()}
    return type(value)(in_double(v) for v in value) if type(value) in (list, tuple) else value
