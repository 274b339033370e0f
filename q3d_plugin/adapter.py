"""A framework's detectors outside of its own scripts: read a config, build, load weights, make a frame, run.

:class:`Adapter` is the interface. It is written once for each framework, in ``mmdet3d/build.py`` and
``openpcdet/build.py``, and everything that builds detectors by itself stands on it: the analysis
(:mod:`q3d_plugin.bench`), ``q3d zoo`` and ``q3d benchmark``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
from torch import Tensor, nn

from q3d_plugin.errors import Q3DError
from q3d_plugin.frame import Frame
from q3d_plugin.raw_outputs import raw_outputs
from q3d_plugin.recipe import Recipe

__all__ = ['Adapter', 'copy_containers', 'without_keys']


class Adapter(ABC):
    """What a framework has to offer to those who build its detectors themselves.

    Attributes:
        name: ``'mmdet3d'`` or ``'openpcdet'``.
        recipe_path: Where the recipe stands in a config, for messages.
        decoding: Names of the methods by which a head decodes its raw outputs.
        folder: The folder of the framework's own configs.
    """

    name = ''
    recipe_path = 'recipe'
    decoding: Tuple[str, ...] = ()
    folder: Path

    @abstractmethod
    def configs(self) -> List[str]:
        """The framework's own configs of detectors, as paths below :attr:`folder`.

        Raises:
            Q3DError: There is no such folder.
        """

    @abstractmethod
    def read(self, path: Path, options: Optional[Mapping[str, str]] = None) -> Any:
        """The config of a file.

        Args:
            path: The file.
            options: Dotted keys to change, and their values as text.

        Raises:
            Q3DError: The file cannot be read or has no model. An error of the framework is its cause.
        """

    @abstractmethod
    def recipe_of(self, cfg: Any, path: Path) -> Recipe:
        """The recipe of a config.

        Args:
            cfg: As :meth:`read` gives it.
            path: Its file, for messages.

        Raises:
            Q3DError: There is none, or it cannot work.
        """

    @abstractmethod
    def float_config(self, cfg: Any) -> Any:
        """A copy of a config with the float types in the place of their Quant types."""

    @abstractmethod
    def quantized_config(self, cfg: Any, recipe: Mapping[str, Any]) -> Any:
        """A copy of a config with every type that has a Quant type replaced by that one.

        Args:
            cfg: A float config.
            recipe: As a plain dictionary; it becomes the recipe of the config.
        """

    @abstractmethod
    def signature(self, cfg: Any) -> str:
        """A text that two configs share whose models do the same on the synthetic frame."""

    @abstractmethod
    def build(self, cfg: Any) -> nn.Module:
        """The model of a config, in eval mode, on the CPU, with random weights.

        Raises:
            Exception: Whatever the framework raises.
        """

    @abstractmethod
    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Loads weights of the same model; BatchNorm is folded where ``model`` is quantized and they are not.

        Args:
            model: Of :meth:`build`; a quantized one is configured.
            state: With its ``_metadata``, as ``state_dict()`` gives it. It may be changed.

        Raises:
            Q3DError: The weights are of another model.
        """

    @abstractmethod
    def prepare(self, model: nn.Module, batch: Any) -> Any:
        """Turns a batch of the framework's loader into one for :meth:`run`, on the model's device."""

    @abstractmethod
    def points_batch(self, model: nn.Module, points: np.ndarray) -> Any:
        """A batch for :meth:`run` of one frame that consists of points alone.

        Args:
            model: Of :meth:`build`.
            points: (N, C) float32: x, y, z in metres, then what the config's data set has.
        """

    @abstractmethod
    def reads_images(self, cfg: Any) -> bool:
        """Whether the model of a config reads the images of cameras."""

    @abstractmethod
    def camera_batch(self, cfg: Any, model: nn.Module, frame: Frame) -> Any:
        """A batch of one frame with points and images, by the config's own steps for testing; not prepared.

        Args:
            cfg: The config; its model reads images.
            model: Its model.
            frame: With cameras.

        Raises:
            Q3DError: The config reads images in another way than those of several cameras around a vehicle.
        """

    def frame_batch(self, cfg: Any, model: nn.Module, frame: Frame) -> Any:
        """A batch for :meth:`run` of one frame with every sensor that the config's model reads.

        Args:
            cfg: The config.
            model: Its model.
            frame: A recorded or a generated one.

        Raises:
            Q3DError: The model reads images, and the frame has none.
        """
        if not self.reads_images(cfg):
            return self.points_batch(model, frame.points)
        if not frame.cameras:
            raise Q3DError(
                f'frame {str(frame.lidar)!r} has points alone, and the model of the config reads images, '
                'too; a folder with one LiDAR file, the images and an info file would work'
            )
        return self.prepare(model, self.camera_batch(cfg, model, frame))

    @abstractmethod
    def synthetic_batch(self, cfg: Any, model: nn.Module) -> Any:
        """A batch for :meth:`run` of one generated frame with every sensor that the config's model reads.

        Args:
            cfg: The config.
            model: Its model.

        Raises:
            Exception: Whatever the framework raises where it cannot make a batch of it.
        """

    @abstractmethod
    def voxels(self, batch: Any) -> Optional[int]:
        """The number of voxels in a batch; None where its points are not voxelized yet."""

    @abstractmethod
    def run(self, model: nn.Module, batch: Any) -> Any:
        """A whole forward pass, with second stages and decoding.

        Args:
            model: Of :meth:`build`.
            batch: Can be given again: dictionaries and lists are copied, tensors are not.
        """

    @abstractmethod
    def training_batch(self, cfg: Any, model: nn.Module, root: Path) -> Any:
        """A batch for :meth:`loss`: the first annotated frame of a config's training data, with its
        augmentation; objects of other frames are not pasted in.

        Args:
            cfg: The config.
            model: Its model.
            root: Folder of the data set, in place of the config's.

        Raises:
            Exception: Whatever the framework raises where it cannot read the data.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The detector's own loss.

        Args:
            model: In training mode.
            batch: Of :meth:`training_batch`; it can be given again.
        """

    def heads_of(self, model: nn.Module) -> List[nn.Module]:
        """The modules of a model that decode raw outputs."""
        return [m for m in model.modules() if any(hasattr(m, name) for name in self.decoding)]

    def forward_of(self, model: nn.Module) -> Callable[[Any], Dict[str, Tensor]]:
        """The forward pass of a model up to the raw outputs of its head, without decoding.

        Args:
            model: Of :meth:`build`.

        Returns:
            callable: Takes a batch, and gives tensors by name. It raises :class:`Q3DError` where no head of
            the model decodes by one of the known methods.
        """
        heads = self.heads_of(model)
        return lambda batch: raw_outputs(heads, self.decoding, lambda: self.run(model, batch))


def copy_containers(value: Any) -> Any:
    """``value`` with new dictionaries and lists around the same objects, for detectors add entries to inputs.

    Examples:
        >>> batch = {'voxels': {'coors': [1]}}
        >>> copied = copy_containers(batch)
        >>> copied['voxels']['more'] = 2
        >>> batch
        {'voxels': {'coors': [1]}}
    """
    if isinstance(value, dict):
        return {k: copy_containers(v) for k, v in value.items()}
    return [copy_containers(v) for v in value] if isinstance(value, list) else value


def without_keys(node: Any, prefixes: Tuple[str, ...]) -> Any:
    """Nested dictionaries and lists without the keys that begin with one of ``prefixes``.

    Examples:
        >>> without_keys([{'loss_cls': 1, 'type': 'Head'}], ('loss',))
        [{'type': 'Head'}]
    """
    if isinstance(node, Mapping):
        return {k: without_keys(v, prefixes) for k, v in node.items() if not str(k).startswith(prefixes)}
    return [without_keys(v, prefixes) for v in node] if isinstance(node, (list, tuple)) else node
