"""What SmoothQuant has to know of the inputs of layers: largest magnitudes by channel, and some rows."""

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from q3d_plugin import numerics
from q3d_plugin.calibration.run import from_all_ranks
from q3d_plugin.layers import QuantWeightLayer

__all__ = ['InputStatistics']


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
        rows: Name -> (rows, C_in, kernel positions): what outputs chosen at random are computed from, of
            every call of the layer as many.
        weights: Name -> (rows,) how many outputs a row stands for, on average 1.
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
        self.rows: Dict[str, Tensor] = {}
        self.weights: Dict[str, Tensor] = {}
        self._sampled, self._count = frozenset(sampled), rows
        self._calls: Dict[str, int] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._last = None

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
            amax = self._amax_of(x, layer.channel_axis(x))
            static = layer.smoothing and layer.smooth_spec.mode == 'static'
            if static:
                amax = amax * layer.smooth_scale.abs()
            self.amax[name] = torch.maximum(self.amax[name], amax) if name in self.amax else amax
            if name in self._sampled:
                self._sample(name, layer, given, output, layer.smooth_scale if static else None)

        return hook

    def _amax_of(self, x: Tensor, axis: int) -> Tensor:
        # The branches of a head read one tensor, one after the other.
        if self._last is None or self._last[0]() is not x or self._last[1] != axis:
            self._last = weakref.ref(x), axis, numerics.channel_amax(x.detach(), axis).float()
        return self._last[2]

    def _sample(
        self, name: str, layer: QuantWeightLayer, x: Any, output: Any, scale: Optional[Tensor]
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
        if name not in self.rows:
            self.rows[name], self.weights[name] = fresh.contiguous(), weights
        else:
            new = new.to(fresh.device)
            self.rows[name][new], self.weights[name][new] = fresh, weights

    def _choose(self, layer: QuantWeightLayer, y: Tensor, count: int) -> Tuple[Tensor, Tensor]:
        """Importance sampling: half of the outputs by their energy, half evenly; and what each stands for.

        Most of a map is empty, and what a detector is for lies in few places.
        """
        axis = layer.channel_axis(y)
        if layer.bias is not None:
            y = y - layer.bias.reshape(-1, *[1] * (y.dim() - 1 - axis))
        energy = torch.linalg.vector_norm(y.float(), dim=axis).double().square().flatten()
        # How much oftener than on average an output is chosen.
        often = 0.5 + 0.5 * energy / energy.mean() if energy.any() else torch.ones_like(energy)
        ends = often.cumsum(0)
        drawn = torch.rand(count, generator=self._generator, dtype=torch.float64).to(y.device) * ends[-1]
        places = torch.searchsorted(ends, drawn).clamp_(max=len(ends) - 1)
        return places, (1 / often[places]).float()

    def infinite(self) -> List[str]:
        """Names of layers whose input held NaN or Inf."""
        if not self.amax:
            return []
        finite = torch.stack([amax.sum() for amax in self.amax.values()]).isfinite().tolist()
        return [name for name, good in zip(self.amax, finite) if not good]

    def merge_ranks(self) -> None:
        """Gives every rank the largest magnitudes that any rank saw; rows stay where they are."""
        everyone = from_all_ranks({name: amax.cpu() for name, amax in self.amax.items()})
        if len(everyone) == 1:
            return
        merged: Dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            seen = [amax[name] for amax in everyone if name in amax]
            if seen:
                merged[name] = torch.stack(seen).amax(0).to(layer.weight.device)
        self.amax = merged
