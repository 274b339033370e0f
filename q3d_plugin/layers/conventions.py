"""Facts about modules of frameworks that the core cannot know, handed in by the adapters (and by users).

An adapter says which of its types stand for others, which run their children in order, which are activation
functions, and which BatchNorm follows which layer in a block of its own. They are looked at when a model is
built, so the adapter has to be imported before that, in whatever order.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Dict, List, Optional, Set, Tuple, Type

from torch import nn
from torch.nn.modules import activation

from q3d_plugin.errors import Q3DError, near_matches

__all__ = ['Pairs', 'add_conventions', 'is_activation', 'is_sequence', 'is_wrapper', 'pairs_of']

Pairs = Callable[[nn.Module], List[Tuple[str, str]]]
"""Gives, for a block, the names of children of its: a layer, and the BatchNorm that reads its output."""

_wrappers: Set[Type[nn.Module]] = set()
_sequences: Set[Type[nn.Module]] = {nn.Sequential}
_activations: Set[Type[nn.Module]] = {getattr(activation, name) for name in activation.__all__}
_pairs: Dict[Type[nn.Module], Pairs] = {}


def add_conventions(
    wrappers: Iterable[Type[nn.Module]] = (),
    sequences: Iterable[Type[nn.Module]] = (),
    activations: Iterable[Type[nn.Module]] = (),
    pairs: Optional[Mapping[Type[nn.Module], Pairs]] = None,
) -> None:
    """Adds types of a framework; harmless when called again.

    Args:
        wrappers: Types that override the forward of a registered layer and compute the same.
        sequences: Types that run their children one after the other, as ``nn.Sequential`` does.
        activations: Types of activation functions.
        pairs: Block type -> which BatchNorm follows which layer in it. The rules that go by names are not
            applied to these types and to those derived from them.

    Raises:
        Q3DError: Pairs were given for a type that is no block, such as ``nn.Sequential``.

    Examples:
        A block that normalizes before the activation and the convolution; its norm2 follows conv1:

        >>> class DenseLayer(nn.ModuleDict):
        ...     pass
        >>> add_conventions(pairs={DenseLayer: lambda block: [('conv1', 'norm2')]})
        >>> pairs_of(DenseLayer({'conv1': nn.Conv2d(3, 4, 1), 'norm2': nn.BatchNorm2d(4)}))
        [('conv1', 'norm2')]
    """
    for cls in pairs or {}:
        if cls is nn.Module or cls in _sequences:
            raise Q3DError(
                f'add_conventions: pairs of {cls.__name__}: it is no block type of its own; a class derived '
                'from it would work'
            )
    _wrappers.update(wrappers)
    _sequences.update(sequences)
    _activations.update(activations)
    _pairs.update(pairs or {})


def is_wrapper(cls: Type[nn.Module]) -> bool:
    """Whether ``cls`` computes what the layer type that it derives from computes."""
    return cls in _wrappers


def is_sequence(module: nn.Module) -> bool:
    """Whether ``module`` runs its children one after the other."""
    return isinstance(module, tuple(_sequences))


def is_activation(module: nn.Module) -> bool:
    """Whether ``module`` is an activation function."""
    return isinstance(module, tuple(_activations))


def pairs_of(module: nn.Module) -> Optional[List[Tuple[str, str]]]:
    """The pairs that were handed in for the type of ``module``; None where there are none.

    Args:
        module: A block.

    Raises:
        Q3DError: A pair names a child that the block does not have.
    """
    cls = next((cls for cls in type(module).__mro__ if cls in _pairs), None)
    if cls is None:
        return None
    pairs = _pairs[cls](module)
    for name in (name for pair in pairs for name in pair):
        if name not in module._modules:
            raise Q3DError(
                f'add_conventions: pairs of {cls.__name__}: it has no child {name!r}'
                + near_matches(name, module._modules)
            )
    return pairs
