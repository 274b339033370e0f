"""The raw outputs of a detector's head: what it hands to the decoding of boxes."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Dict, List, Tuple

from torch import Tensor, nn

from q3d_plugin.errors import Q3DError

__all__ = ['flatten_tensors', 'raw_outputs']


def flatten_tensors(value: Any, prefix: str = '') -> Dict[str, Tensor]:
    """All floating point tensors in nested lists, tuples and dictionaries, by their dotted place.

    Args:
        value: Anything; what is no floating point tensor is left out.
        prefix: The place of ``value`` itself.

    Examples:
        >>> import torch
        >>> list(flatten_tensors({'a': [torch.ones(1), 3], 'b': torch.ones(2)}))
        ['a.0', 'b']
    """
    if isinstance(value, Tensor):
        return {prefix: value} if value.is_floating_point() else {}
    out: Dict[str, Tensor] = {}
    items = value.items() if isinstance(value, Mapping) else ()
    if isinstance(value, (list, tuple)):
        items = enumerate(value)
    for key, item in items:
        out.update(flatten_tensors(item, f'{prefix}.{key}' if prefix else str(key)))
    return out


def _labels_of(head: nn.Module, outputs: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """The classes of the proposals of a head that keeps them in itself, beside the scores."""
    labels, scores = getattr(head, 'query_labels', None), 'query_heatmap_score'
    if not isinstance(labels, Tensor):
        return {}
    return {f'{name[: -len(scores)]}query_labels': labels for name in outputs if name.endswith(scores)}


class _Captured(BaseException):
    """Ends a forward pass where the raw outputs are known. Not an Exception: nothing on the way keeps it."""

    def __init__(self, outputs: Dict[str, Tensor]) -> None:
        super().__init__()
        self.outputs = outputs


def raw_outputs(heads: Sequence[nn.Module], methods: Sequence[str], run: Callable) -> Dict[str, Tensor]:
    """The tensors that a head gives to its decoding, without the decoding.

    Decoding costs time, and boxes of NaN can end in an error.

    Args:
        heads: Modules of which one decodes.
        methods: Names that the decoding method may have.
        run: The forward pass.

    Returns:
        dict: Tensors by their dotted place in the arguments of the decoding. Of a head that chooses
        proposals, as TransFusionHead does, also their classes: integers (B, P), under ``query_labels``.

    Raises:
        Q3DError: The pass ended without any of those methods.
    """
    changed: List[Tuple[nn.Module, str]] = []

    def capture_of(head: nn.Module, decode: Callable) -> Callable:
        signature = inspect.signature(decode)

        def capture(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            found = [tensors for tensors in map(flatten_tensors, given.values()) if tensors]
            # Where one argument holds everything, its name says nothing.
            outputs = found[0] if len(found) == 1 else flatten_tensors(dict(given))
            raise _Captured({**outputs, **_labels_of(head, outputs)})

        return capture

    for head in heads:
        for method in methods:
            if hasattr(head, method):
                head.__dict__[method] = capture_of(head, getattr(head, method))
                changed.append((head, method))
    try:
        run()
    except _Captured as captured:
        return captured.outputs
    finally:
        for head, method in changed:
            del head.__dict__[method]
    raise Q3DError(
        f'the raw outputs of this detector are not known: none of its parts decodes by {" or ".join(methods)}'
    )
