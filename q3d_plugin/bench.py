"""A loaded detector to experiment with, the same for both frameworks: the door of the analysis.

:func:`q3d_plugin.analysis.opening.open_bench` gives a :class:`Bench` for a config and a checkpoint. What is
behind it is written once for each framework, in ``mmdet3d/bench.py`` and ``openpcdet/bench.py``.
"""

import contextlib
import hashlib
import inspect
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from q3d_plugin import lifecycle
from q3d_plugin.errors import Q3DError
from q3d_plugin.recipe import Recipe

__all__ = ['Bench', 'Frames', 'file_hash', 'flatten_tensors', 'quiet', 'raw_outputs']


class Frames:
    """Batches that can be gone through any number of times; each is prepared when it is asked for.

    Args:
        source: The framework's loader.
        prepare: Makes of a batch what the model's forward pass takes.
    """

    def __init__(self, source: Iterable, prepare: Callable = lambda batch: batch) -> None:
        self._source, self._prepare = source, prepare

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator:
        return (self._prepare(batch) for batch in self._source)


class Bench(ABC):
    """A detector with its weights and its data.

    Attributes:
        framework: ``'mmdet3d'`` or ``'openpcdet'``.
        model: The detector in eval mode, on its device.
        recipe: The config's recipe, which the model has the quantizers of.
        recipe_path: Where the recipe stands in the config, for messages.
        classes: Names of the classes.
        config: The config file.
        checkpoint: The checkpoint file.
        quantized: Whether the checkpoint was a quantized one, so that the model has ranges already.
        logger: For warnings.
    """

    framework = ''
    recipe_path = 'recipe'
    model: nn.Module
    recipe: Recipe
    classes: Tuple[str, ...]
    config: Path
    checkpoint: Path
    quantized: bool
    logger: logging.Logger

    @abstractmethod
    def frames(self, split: str, count: int, seed: int = 0) -> Frames:
        """Frames of a split, prepared as for testing, one a batch, ready for :meth:`forward`.

        Args:
            split: ``'train'``, ``'val'`` or ``'test'``.
            count: How many; all of the split where it has fewer.
            seed: Chooses them, as the recipe's calibration does.

        Raises:
            Q3DError: There is no such split, or it is empty.
        """

    @abstractmethod
    def forward(self, batch: Any) -> Dict[str, Tensor]:
        """The raw outputs of the detector's head by name, before boxes are decoded.

        Args:
            batch: Of :meth:`frames`. It can be given again; the same tensors go in.
        """

    @abstractmethod
    def run(self, batch: Any) -> Any:
        """A whole forward pass, with second stages and decoding."""

    @abstractmethod
    def evaluate(self, folder: Optional[Path] = None) -> Dict[str, Any]:
        """Runs the framework's own evaluation on the config's test set.

        Args:
            folder: Where the detections are kept (nuScenes: ``results_nusc.json`` somewhere below it).

        Returns:
            dict: ``mAP``, ``NDS`` (None where the metric has none), ``AP`` by class, and everything that the
            framework reported under ``all``.
        """

    @abstractmethod
    def settings(self) -> Dict[str, Any]:
        """What of the config decides results, beside the recipe: plain data, to tell configs apart."""

    @property
    @abstractmethod
    def second_stage(self) -> bool:
        """Whether layers come after the head of :meth:`forward`, so that calibration needs :meth:`run`."""

    def keep_float_state(self) -> None:
        """Remembers the weights as they are, for :meth:`prepare`."""
        self._float_state = {
            k: v.detach().clone() for k, v in self.model.state_dict().items() if '_quantizer.' not in k
        }

    def prepare(self, recipe: Recipe, frames: Optional[Iterable] = None, title: str = '') -> None:
        """Gives the model the float weights of the checkpoint and the quantizers of ``recipe``, calibrated.

        Args:
            recipe: What to make.
            frames: Calibration frames; those that the recipe names where None.
            title: For the progress bar.

        Raises:
            Q3DError: The recipe does not fit the model, the checkpoint is a quantized one, or an activation
                holds NaN.
        """
        if self.quantized:
            raise Q3DError(
                f'checkpoint {str(self.checkpoint)!r} is quantized already: give the float checkpoint to try '
                'other recipes'
            )
        self.configure(recipe)
        with torch.no_grad():
            for key, value in self.model.state_dict().items():
                kept = self._float_state.get(key)
                if kept is not None and kept.shape == value.shape:
                    value.copy_(kept)
        if recipe.mode != 'float':
            self.calibrate(frames, title)

    def configure(self, recipe: Recipe) -> None:
        """Gives the model the quantizers of ``recipe``, without ranges."""
        lifecycle.configure(self.model, recipe)
        self.recipe = recipe

    def calibrate(self, frames: Optional[Iterable] = None, title: str = '') -> None:
        """Takes the ranges of the model as it is.

        Args:
            frames: Those that the recipe names where None.
            title: For the progress bar.
        """
        if frames is None:
            spec = self.recipe.calibration
            frames = self.frames(spec.split, spec.frames, spec.seed)
        forward = self.run if self.second_stage else self.forward
        batches = tqdm(frames, desc=title or 'calibration', unit='frame', leave=False)
        lifecycle.calibrate(self.model, batches, forward, logger=self.logger)


def flatten_tensors(value: Any, prefix: str = '') -> Dict[str, Tensor]:
    """All floating point tensors in nested lists, tuples and dictionaries, by their dotted place.

    Examples:
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


class _Captured(BaseException):
    """Ends a forward pass where the raw outputs are known. Not an Exception: nothing on the way keeps it."""

    def __init__(self, outputs: Dict[str, Tensor]) -> None:
        super().__init__()
        self.outputs = outputs


def raw_outputs(heads: Sequence[nn.Module], methods: Sequence[str], run: Callable) -> Dict[str, Tensor]:
    """What a head hands to its decoding, without the decoding.

    Decoding costs time, and boxes of NaN can end in an error.

    Args:
        heads: Modules of which one decodes.
        methods: Names that the decoding method may have.
        run: The forward pass.

    Raises:
        Q3DError: The pass ended without any of those methods.
    """
    changed: List[Tuple[nn.Module, str]] = []

    def capture_of(decode: Callable) -> Callable:
        signature = inspect.signature(decode)

        def capture(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            found = [tensors for tensors in map(flatten_tensors, given.values()) if tensors]
            # Where one argument holds everything, its name says nothing.
            raise _Captured(found[0] if len(found) == 1 else flatten_tensors(dict(given)))

        return capture

    for head in heads:
        for method in methods:
            if hasattr(head, method):
                head.__dict__[method] = capture_of(getattr(head, method))
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


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        for piece in iter(lambda: f.read(2**20), b''):
            digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within, what frameworks print goes nowhere: it would break up tables and progress bars."""
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        yield
