"""Switches the layers of a calibrated model between quantized and float, one by one."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Dict, List, Tuple

from torch import nn

from q3d_plugin import lifecycle
from q3d_plugin.layers import QuantUnit, QuantWeightLayer
from q3d_plugin.quantizer import Mode

__all__ = ['Switch']


class Switch:
    """Says which units of a calibrated model quantize; the others compute in float.

    Layers that read one tensor share a quantizer, so a quantizer cannot be switched for one of them. A unit
    is made float by taking its quantizers from it, and gets the same ones back.

    Args:
        model: Calibrated.

    Attributes:
        names: Names of the units that have something to quantize.
    """

    def __init__(self, model: nn.Module) -> None:
        self._units: Dict[str, QuantUnit] = {}
        self._kept: Dict[str, Tuple] = {}
        for name, unit in lifecycle.units(model):
            if any(q.mode is not Mode.FLOAT and not q._disabled for q in unit.quantizers()):
                self._units[name] = unit
                self._kept[name] = (unit.input_quantizer, getattr(unit, 'weight_quantizer', None))
        self.names: List[str] = list(self._units)

    def unit(self, name: str) -> QuantUnit:
        """The unit of a name."""
        return self._units[name]

    def set(self, name: str, quantized: bool) -> None:
        """Makes one unit quantize or compute in float."""
        unit = self._units[name]
        unit.input_quantizer = self._kept[name][0] if quantized else None
        if isinstance(unit, QuantWeightLayer):
            unit.weight_quantizer = self._kept[name][1] if quantized else None

    def only(self, names: Collection[str]) -> None:
        """Makes the units of ``names`` quantize, and no others."""
        for name in self.names:
            self.set(name, name in names)

    @contextmanager
    def restored(self) -> Iterator['Switch']:
        """Within, units are switched; at the end all of them quantize again."""
        try:
            yield self
        finally:
            self.only(self.names)
