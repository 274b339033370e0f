"""The models that are measured: float and quantized with the same weights, and the passes over a frame."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from q3d_plugin import lifecycle
from q3d_plugin.adapter import Adapter
from q3d_plugin.calibration import collect
from q3d_plugin.errors import Q3DError
from q3d_plugin.frame import Frame
from q3d_plugin.frameworks import adapter_of
from q3d_plugin.layers import QuantWeightLayer
from q3d_plugin.layers.model import switched
from q3d_plugin.quantizer import Mode, Quantizer
from q3d_plugin.recipe import Recipe

__all__ = ['Subject', 'build_model', 'open_config', 'weight_layers']

WITH_RANGE = (Mode.SIGNED, Mode.UNSIGNED)


def open_config(path: str) -> Tuple[Adapter, Any, Recipe]:
    """The adapter of a config's framework, the config, and its recipe.

    Args:
        path: A config with Quant types and a recipe.

    Raises:
        Q3DError: The file is missing, cannot be read, or has no model or no recipe.
    """
    adapter = adapter_of(path)
    config = adapter.read(path)
    return adapter, config, adapter.recipe_of(config, path)


def build_model(
    adapter: Adapter, config: Any, recipe: Recipe, quantized: bool, device: torch.device
) -> nn.Module:
    """A model of the config in eval mode, with random weights that are the same every time.

    Args:
        adapter: Of the config's framework.
        config: With Quant types.
        recipe: For the quantizers.
        quantized: Whether to keep the Quant types and give them their quantizers.
        device: Where to put it.

    Raises:
        Q3DError: The framework cannot build it.
    """
    torch.manual_seed(0)
    try:
        model = adapter.build(config if quantized else adapter.float_config(config)).to(device)
    except Exception as error:
        first = (str(error).splitlines() or [''])[0]
        raise Q3DError(f'model of the config does not build: {type(error).__name__}: {first}') from error
    if quantized:
        lifecycle.configure(model, recipe)
    return model


@torch.no_grad()
def settle_batch_norm(model: nn.Module, forward: Callable[[], Any]) -> None:
    """Gives every BatchNorm the statistics of a forward pass, so that activations have the sizes of a trained
    model's.

    Those whose weights are all zero, as the last ones of residual blocks are before training, get ones: their
    branches would be nothing.

    Args:
        model: In eval mode.
        forward: Runs it.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    before = [m.momentum for m in norms]
    for norm in norms:
        if norm.affine and not norm.weight.any():
            norm.weight.fill_(1.0)
        norm.momentum = 1.0
        norm.train()
    forward()
    for norm, momentum in zip(norms, before):
        norm.momentum = momentum
        norm.eval()


def weight_layers(model: nn.Module) -> List[QuantWeightLayer]:
    """The layers of ``model`` whose weight is quantized."""
    layers = [m for m in model.modules() if isinstance(m, QuantWeightLayer)]
    return [m for m in layers if m.weight_quantizer is not None and m.weight_quantizer.mode in WITH_RANGE]


class Subject:
    """A float model, the quantized one with the same weights, and a frame.

    A forward pass goes from voxels to the raw outputs of the head; BEVFusion's makes the voxels itself.

    Args:
        path: A config with Quant types and a recipe.
        frame: A recorded or a generated one, with images where the model reads them.
        device: Where to measure.
        data: Folder of the config's data set; training reads an annotated frame of it.

    Attributes:
        adapter: Of the config's framework.
        path: The config file.
        config: As the adapter read it.
        recipe: Its recipe.
        device: Where the models are.
        points: Number of points of the frame.
        images: Number of its images; 0 where the model reads none.
        inputs: The frame as a batch of the framework.
        float_model: With BatchNorm.
        float_forward: Its forward pass of a batch.
        model: Quantized and calibrated on the frame.
        forward: Its forward pass of a batch.
        annotated: A batch with annotations, for training; None where no data set was given.
        weights: The quantizers of weights that have a range.
        activations: Those of activations.
    """

    def __init__(self, path: str, frame: Frame, device: torch.device, data: Optional[Path] = None) -> None:
        self.path, self.device, self.points = path, device, len(frame.points)
        self.adapter, self.config, self.recipe = open_config(path)
        self.float_model = self._build(quantized=False)
        self.float_forward = self.adapter.forward_of(self.float_model)
        self.inputs = self.adapter.frame_batch(self.config, self.float_model, frame)
        self.images = len(frame.cameras) if self.adapter.reads_images(self.config) else 0
        if self.adapter.voxels(self.inputs) == 0:
            raise Q3DError("frame: not one point is within the config's point cloud range")
        self.annotated = None if data is None else self._annotated(data)
        settle_batch_norm(self.float_model, self.run_float)
        self.model = self._build(quantized=True)
        self.forward = self.adapter.forward_of(self.model)
        self.adapter.load(self.model, self.float_model.state_dict())
        lifecycle.calibrate(self.model, [self.inputs], self.forward)
        # What saw no data was left float, and has no part in this.
        ranged = [q for q in lifecycle.quantizers(self.model) if q.mode in WITH_RANGE]
        self.weights = [q for q in ranged if q.per_channel]
        self.activations = [q for q in ranged if not q.per_channel]

    def _build(self, quantized: bool) -> nn.Module:
        return build_model(self.adapter, self.config, self.recipe, quantized, self.device)

    def _annotated(self, data: Path) -> Any:
        try:
            return self.adapter.training_batch(self.config, self.float_model, data)
        except Exception as error:  # whatever a framework can raise
            first = (str(error).splitlines() or [''])[0]
            raise Q3DError(
                f'--data: the training data of the config cannot be read from {str(data)!r}: '
                f'{type(error).__name__}: {first}'
            ) from error

    @property
    def quantizers(self) -> List[Quantizer]:
        """Those of activations, then those of weights."""
        return [*self.activations, *self.weights]

    @torch.no_grad()
    def run_float(self) -> None:
        """The float forward, BatchNorm unfolded."""
        self.float_forward(self.inputs)

    @torch.no_grad()
    def run_folded(self) -> None:
        """The quantized model with all quantizers off."""
        with switched(self.quantizers, False):
            self.forward(self.inputs)

    def run_statistics(self) -> None:
        """The pass of a calibration that takes statistics."""
        with switched(self.weights, False):
            collect(self.model, [self.inputs], self.forward, self.activations)
        for quantizer in self.activations:
            quantizer.observer = None

    @torch.no_grad()
    def run_int8(self) -> None:
        """The quantized model."""
        self.forward(self.inputs)

    @torch.no_grad()
    def visit(self, function: Callable[[int, Tensor], None]) -> None:
        """Runs the folded float model and calls ``function(index of the quantizer, input)``, once per
        distinct tensor, where an activation quantizer reads one.

        Args:
            function: Called in the middle of the forward pass.
        """
        last: Dict[int, Tuple] = {}

        def hook(index: int) -> Callable:
            def seen(_, args) -> None:
                x = args[0]
                before = last.get(index)
                if x.numel() and not (before and before[0]() is x and before[1] == x._version):
                    last[index] = (weakref.ref(x), x._version)
                    function(index, x)

            return seen

        handles = [q.register_forward_pre_hook(hook(i)) for i, q in enumerate(self.activations)]
        try:
            self.run_folded()
        finally:
            for handle in handles:
                handle.remove()
