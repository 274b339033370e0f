"""A loaded detector with its data and its metric, the same for both frameworks: what the analysis works on.

A :class:`Bench` is made of a config and a checkpoint, by :func:`q3d_plugin.analysis.opening.open_bench`. Its
data and its metric are written once for each framework, in ``mmdet3d/bench.py`` and ``openpcdet/bench.py``,
on top of :mod:`q3d_plugin.adapter`, by which detectors are built and run.
"""

import contextlib
import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from q3d_plugin import lifecycle
from q3d_plugin.adapter import Adapter
from q3d_plugin.errors import Q3DError
from q3d_plugin.frame import Frame
from q3d_plugin.raw_outputs import raw_outputs
from q3d_plugin.recipe import Recipe

__all__ = ['Bench', 'Frames', 'file_hash', 'quiet', 'raw_outputs']


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
        adapter: That framework's.
        cfg: The config, as the adapter reads it.
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
    adapter: Adapter
    cfg: Any
    model: nn.Module
    recipe: Recipe
    classes: Tuple[str, ...]
    config: Path
    checkpoint: Path
    quantized: bool
    logger: logging.Logger
    _raw_outputs: Optional[Callable] = None
    _frame: Any = None

    @abstractmethod
    def frames_of_split(self, split: str, count: int, seed: int = 0) -> Frames:
        """As :meth:`frames`, from the data set of the config."""

    def frames(self, split: str, count: int, seed: int = 0) -> Frames:
        """Frames of a split, prepared as for testing, one a batch, ready for :meth:`forward`.

        Where a frame was given by :meth:`use_frame`, it is that one alone.

        Args:
            split: ``'train'``, ``'val'`` or ``'test'``.
            count: How many; all of the split where it has fewer.
            seed: Chooses them, as the recipe's calibration does.

        Raises:
            Q3DError: There is no such split, or it is empty.
        """
        if self._frame is not None:
            return Frames([self._frame])
        return self.frames_of_split(split, count, seed)

    def use_frame(self, frame: Frame) -> None:
        """Gives a frame that is used from now on in place of those of the data set.

        Args:
            frame: With every sensor that the model reads.

        Raises:
            Q3DError: A sensor is missing.
        """
        self._frame = self.adapter.frame_batch(self.cfg, self.model, frame)

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

    def prepare_batch(self, batch: Any) -> Any:
        """A batch of the framework's loader as :meth:`forward` takes it: voxels, tensors on the device."""
        return self.adapter.prepare(self.model, batch)

    @torch.no_grad()
    def forward(self, batch: Any) -> Dict[str, Tensor]:
        """The raw outputs of the detector's head by name, before boxes are decoded.

        Args:
            batch: Of :meth:`frames`. It can be given again; the same tensors go in.
        """
        if self._raw_outputs is None:
            self._raw_outputs = self.adapter.forward_of(self.model)
        return self._raw_outputs(batch)

    @torch.no_grad()
    def run(self, batch: Any) -> Any:
        """A whole forward pass, with second stages and decoding."""
        return self.adapter.run(self.model, batch)

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
