"""Statistics of the inputs of layers for SmoothQuant: largest magnitudes by channel, and some rows."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from q3d_plugin.calibration.run import from_all_ranks
from q3d_plugin.layers import QuantWeightLayer
from q3d_plugin.memo import TensorMemo

__all__ = ['InputSample', 'InputStatistics']


class InputSample(NamedTuple):
    """The inputs that some outputs of a layer are computed from, and the extent of the whole input.

    Attributes:
        rows: (R, C_in, kernel positions) inputs of R outputs; see ``QuantWeightLayer.rows_of``.
        weights: (R,) how many outputs a row stands for, on average 1.
        amax: (C_in,) largest magnitudes of the whole input.
        minimum: Smallest value of the whole input.
        amax_of_call: (R, C_in) largest magnitudes of the tensor that each row is from; None where all tensors
            have one range.
    """

    rows: Tensor
    weights: Tensor
    amax: Tensor
    minimum: float
    amax_of_call: Optional[Tensor] = None


class InputStatistics:
    """Statistics of the inputs of layers, taken by hooks; of sparse layers those of active voxels.

    Args:
        layers: Layers with a weight by name.
        sampled: Names of those of which rows are kept.
        rows: How many rows are kept of each.
        seed: Chooses the rows.

    Attributes:
        amax: Name -> (C_in,) largest magnitudes so far, of what is quantized: explicit scales of an earlier
            smoothing are in it. Layers that were not called are not in it.
        minimum: Name -> smallest value so far, in the same way; a tensor without dimensions.
        rows: Name -> (rows, C_in, kernel positions): what outputs chosen at random are computed from, of
            every call of the layer as many.
        weights: Name -> (rows,) how many outputs a row stands for, on average 1.
        amax_of_call: Name -> (rows, C_in) largest magnitudes of the tensor that each row is from; of layers
            whose range is that of each tensor.
    """

    def __init__(
        self,
        layers: Mapping[str, QuantWeightLayer],
        sampled: Iterable[str] = (),
        rows: int = 256,
        seed: int = 0,
    ) -> None:
        self.layers = layers
        self.amax: Dict[str, Tensor] = {}
        self.minimum: Dict[str, Tensor] = {}
        self.rows: Dict[str, Tensor] = {}
        self.weights: Dict[str, Tensor] = {}
        self.amax_of_call: Dict[str, Tensor] = {}
        self._sampled, self._count = frozenset(sampled), rows
        self._calls: Dict[str, int] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._extents: Dict[int, TensorMemo] = {}

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Takes statistics of every forward pass inside."""
        handles = [
            layer.register_forward_hook(self._hook(name), with_kwargs=True)
            for name, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str):
        def hook(layer, args, kwargs, output):
            given = args[0] if args else next(iter(kwargs.values()))
            x = layer.features(given)
            if x.numel() == 0:
                return
            low, high = self._extent_of(x, layer.channel_axis(x))
            static = layer.smoothing and layer.smooth_spec.mode == 'static'
            if static:
                low, high = low * layer.smooth_scale, high * layer.smooth_scale
            amax, minimum = torch.maximum(high, -low), low.amin()
            known = name in self.amax
            self.amax[name] = torch.maximum(self.amax[name], amax) if known else amax
            self.minimum[name] = torch.minimum(self.minimum[name], minimum) if known else minimum
            if name in self._sampled:
                self._sample(name, layer, given, output, layer.smooth_scale if static else None, amax)

        return hook

    def _extent_of(self, x: Tensor, axis: int) -> Tuple[Tensor, Tensor]:
        """(C,) smallest and largest values of the channels of ``x``."""
        # The branches of a head read one tensor, one after the other.
        memo = self._extents.setdefault(axis % x.dim(), TensorMemo())
        extent = memo.value_of(x)
        if extent is None:
            others = [i for i in range(x.dim()) if i != axis % x.dim()]
            low, high = x.detach(), x.detach()
            if others:
                low, high = low.amin(others), high.amax(others)
            extent = low.float(), high.float()
            memo.keep(x, extent)
        return extent

    def _sample(
        self,
        name: str,
        layer: QuantWeightLayer,
        x: Any,
        output: Any,
        scale: Optional[Tensor],
        amax: Tensor,
    ) -> None:
        """Reservoir sampling: after n calls each row is of each call with probability 1/n."""
        if layer.features(output).numel() == 0:
            return
        calls = self._calls[name] = self._calls.get(name, 0) + 1
        new = torch.rand(self._count, generator=self._generator) * calls < 1
        if not new.any():
            return
        places, weights = self._choose(layer, layer.features(output).detach(), int(new.sum()))
        fresh = layer.rows_of(x, output, places).detach().float()
        if scale is not None:
            fresh = fresh * scale[:, None]
        new = new.to(fresh.device)
        self._put(self.rows, name, new, fresh)
        self._put(self.weights, name, new, weights)
        if _is_dynamic(layer):
            self._put(self.amax_of_call, name, new, amax.expand(len(fresh), -1))

    def _put(self, kept: Dict[str, Tensor], name: str, where: Tensor, values: Tensor) -> None:
        if name in kept:
            kept[name][where] = values
        else:
            kept[name] = values.clone(memory_format=torch.contiguous_format)

    def sample(self, name: str) -> InputSample:
        """The rows of a layer of which some were kept, and the extent of its input."""
        extent = self.amax[name], self.minimum[name].item()
        return InputSample(self.rows[name], self.weights[name], *extent, self.amax_of_call.get(name))

    def _choose(self, layer: QuantWeightLayer, y: Tensor, count: int) -> Tuple[Tensor, Tensor]:
        """Importance sampling: half of the outputs by their energy, half evenly; and what each stands for.

        Most of a map is empty, and what a detector is for lies in few places.
        """
        axis = layer.channel_axis(y)
        if layer.bias is not None:
            y = y - layer.bias.reshape(-1, *[1] * (y.dim() - 1 - axis))
        # On the host: on CUDA cumsum raises where algorithms have to be deterministic, and this is one number
        # for each place.
        energy = torch.linalg.vector_norm(y.float(), dim=axis).cpu().double().square().flatten()
        # How much oftener than on average an output is chosen.
        often = 0.5 + 0.5 * energy / energy.mean() if energy.any() else torch.ones_like(energy)
        ends = often.cumsum(0)
        drawn = torch.rand(count, generator=self._generator, dtype=torch.float64) * ends[-1]
        places = torch.searchsorted(ends, drawn).clamp_(max=len(ends) - 1)
        return places.to(y.device), (1 / often[places]).float().to(y.device)

    def infinite(self) -> List[str]:
        """Names of layers whose input held NaN or Inf."""
        if not self.amax:
            return []
        finite = torch.stack([amax.sum() for amax in self.amax.values()]).isfinite().tolist()
        return [name for name, good in zip(self.amax, finite) if not good]

    def merge_ranks(self) -> None:
        """Gives every rank the extents over all ranks; rows stay where they are."""
        mine = {name: (amax.cpu(), self.minimum[name].cpu()) for name, amax in self.amax.items()}
        everyone = from_all_ranks(mine)
        if len(everyone) == 1:
            return
        self.amax, self.minimum = {}, {}
        for name, layer in self.layers.items():
            seen = [extents[name] for extents in everyone if name in extents]
            if seen:
                amax, minimum = (torch.stack(values) for values in zip(*seen))
                self.amax[name] = amax.amax(0).to(layer.weight.device)
                self.minimum[name] = minimum.amin(0).to(layer.weight.device)


def _is_dynamic(layer: QuantWeightLayer) -> bool:
    """Whether the input's range is the largest magnitude of each tensor."""
    return layer.input_quantizer is not None and layer.input_quantizer.spec.range == 'dynamic'
