"""The coverage table: every layer of a model, quantized how, or why not."""

import json
import math
from collections.abc import Sequence
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from q3d_plugin.files import write_text
from q3d_plugin.layers import QuantUnit, is_converted, why_not
from q3d_plugin.quantizer import Mode, Quantizer, Role, Stage
from q3d_plugin.text import text_table

__all__ = [
    'NORMALIZATION',
    'CoverageRow',
    'Totals',
    'counted',
    'coverage',
    'coverage_table',
    'is_layer',
    'residual_blocks',
    'write_coverage',
]

NORMALIZATION = 'normalization, stays float'
"""Why a normalization by the statistics of its input is float; it is no layer that could be quantized."""

_NORMALIZATIONS = (nn.LayerNorm, nn.GroupNorm, _InstanceNorm)

NO_DATA = 'saw no data during calibration'
"""Why a layer is float that no calibration frame reached."""


class CoverageRow(NamedTuple):
    """One line of the coverage table.

    Attributes:
        smoothquant: Where the layer is smoothed: ``alpha``, ``mode``, ``producers`` (the layers that have the
            inverse scales) and ``explicit`` (whether its input is multiplied). Not a column of the table.
        target: The engine that the recipe is for; empty where no recipe was applied. Not a column either.
    """

    name: str
    kind: str
    weight: str
    activation: str
    shared_with: str
    note: str
    smoothquant: Optional[Dict[str, Any]] = None
    target: str = ''

    @property
    def quantized(self) -> bool:
        """Whether anything of the layer is quantized."""
        return bool(self.weight or self.activation)


def _describe(quantizer: Optional[Quantizer], disabled_word: str = '') -> str:
    if quantizer is None or quantizer.stage in (Stage.FLOAT, Stage.OFF):
        return disabled_word
    bits = quantizer.num_bits
    if quantizer.role is Role.WEIGHT:
        return f'int{bits} per channel'
    if quantizer.stage is Stage.UNCALIBRATED:
        return f'{bits} bits, no range yet'
    kind = ('uint' if quantizer.unsigned else 'int') + str(bits)
    return f'{kind} dynamic' if quantizer.dynamic else f'{kind} amax {quantizer._amax.item():.4g}'


def _own_weights(module: nn.Module) -> List[Tensor]:
    """The weights that ``module`` itself holds: ``weight``, and matrices such as ``in_proj_weight``."""
    return [
        p
        for name, p in module._parameters.items()
        if p is not None and (name == 'weight' or ('weight' in name and p.dim() > 1))
    ]


def coverage(model: nn.Module) -> List[CoverageRow]:
    """One row for every layer with a weight, addition and concatenation: quantized how, or why not.

    Args:
        model: Configured or not.
    """
    rows, first_owner = [], {}
    for name, module in model.named_modules():
        if isinstance(module, QuantUnit):
            quantizer = module.input_quantizer
            shared = first_owner.setdefault(id(quantizer), name) if quantizer is not None else name
            weight = _describe(getattr(module, 'weight_quantizer', None))
            # The layer never ran, though another one may read the tensor that its input quantizer is for.
            idle = getattr(getattr(module, 'weight_quantizer', None), 'mode', None) is Mode.FLOAT
            activation = '' if idle else _describe(quantizer)
            off = any(q.stage is Stage.OFF for q in module.quantizers())
            note = module.float_reason or (NO_DATA if idle else '')
            note = note or ('switched off' if off and not (weight or activation) else '')
            smoothed, words = _smoothing_of(module)
            note = '; '.join(part for part in (note, words) if part)
            shared = '' if shared == name else shared
            rows.append(
                CoverageRow(name, module.kind, weight, activation, shared, note, smoothed, module.target)
            )
        elif isinstance(module, Quantizer):
            continue
        elif isinstance(module, _BatchNorm):
            rows.append(
                CoverageRow(name, type(module).__name__, '', '', '', 'no layer before it to fold into')
            )
        elif not is_converted(module) and _own_weights(module):
            reason = why_not(module) or 'its part of the model has no Quant type'
            reason = NORMALIZATION if isinstance(module, _NORMALIZATIONS) else reason
            rows.append(CoverageRow(name, type(module).__name__, '', '', '', reason))
    return rows


def _smoothing_of(module: QuantUnit) -> Tuple[Optional[Dict[str, Any]], str]:
    """The smoothing of a unit: as plain data for JSON, and in words for the table."""
    spec = getattr(module, 'smooth_spec', None)
    if spec is None:
        return None, ''
    alpha = module.smooth_alpha.item()
    if math.isnan(alpha):
        return dict(alpha=None, mode=spec.mode, producers=[], explicit=False), module.smooth_note
    alpha = round(alpha, 6)
    # A checkpoint has the scales, not the names of the layers that they went into.
    places = {'dynamic': 'dynamic', True: 'explicit multiplication', False: 'scale in the layers before it'}
    place = places[spec.mode if spec.mode == 'dynamic' else module.smoothing]
    known = dict(
        alpha=alpha, mode=spec.mode, producers=list(module.smooth_producers), explicit=module.smoothing
    )
    return known, module.smooth_note or f'SmoothQuant {alpha:g}, {place}'


def coverage_table(rows: List[CoverageRow]) -> str:
    """The rows as a text table with a line of totals."""
    lines = [
        text_table(['layer', 'type', 'weight', 'input', 'input shared with', 'note'], [r[:6] for r in rows])
    ]
    targets = [row.target for row in rows if row.target]
    engine = f', for target {targets[0]!r}' if targets else ''
    totals = counted([(row.kind, row.note, row.quantized) for row in rows])
    lines.append(f'{totals.words}{engine}')
    stages = residual_blocks(rows)
    if stages:
        lines.append('residual blocks: ' + ', '.join(f'{part} {counts}' for part, counts in stages.items()))
    return '\n'.join(lines)


class Totals(NamedTuple):
    """Sums over a coverage table.

    Attributes:
        layers: For each layer with a weight, whether it is quantized.
        operations: For each addition and concatenation.
        operands: For each operand of a product of two activations.
    """

    layers: List[bool]
    operations: List[bool]
    operands: List[bool]

    @property
    def words(self) -> str:
        """The sums as the end of the table has them."""
        words = f'{sum(self.layers)} of {len(self.layers)} layers quantized, and {sum(self.operations)} '
        words += 'additions and concatenations'
        products = f', {sum(self.operands)} of {len(self.operands)} operands of matrix products'
        return words + (products if self.operands else '')


def counted(rows: Sequence[Tuple[str, str, bool]]) -> Totals:
    """Sums over the rows of a coverage table, each as its kind, its note and whether it is quantized.

    Examples:
        >>> counted([('Conv2d', '', True), ('Add', '', True), ('LayerNorm', NORMALIZATION, False)]).words
        '1 of 1 layers quantized, and 1 additions and concatenations'
    """
    totals = Totals([], [], [])
    for kind, note, quantized in rows:
        if note != NORMALIZATION:
            getattr(totals, _sum_of(kind)).append(bool(quantized))
    return totals


def _sum_of(kind: str) -> str:
    """The attribute of :class:`Totals` that a row of this kind counts in."""
    return {'Add': 'operations', 'Concat': 'operations', 'MatMul': 'operands'}.get(kind, 'layers')


def is_layer(kind: str, note: str) -> bool:
    """Whether a row of the coverage table, by its kind and its note, is a layer that could be quantized."""
    return note != NORMALIZATION and _sum_of(kind) == 'layers'


def residual_blocks(rows: List[CoverageRow]) -> Dict[str, List[int]]:
    """Number of residual blocks with a quantized addition in each stage, by the module that holds the stages.

    Args:
        rows: Of the coverage table.

    Examples:
        >>> names = [f'backbone.layer{i}.{j}.add' for i, count in ((1, 3), (2, 4)) for j in range(count)]
        >>> residual_blocks([CoverageRow(name, 'Add', '', 'int8', '', '') for name in names])
        {'backbone': [3, 4]}
    """
    stages: Dict[str, Dict[str, int]] = {}
    for row in rows:
        # part.stage.block.add, where the blocks of a stage are numbered.
        *part, stage, block, _ = row.name.split('.') if row.name.count('.') > 2 else ('', '', '')
        if row.kind == 'Add' and row.quantized and block.isdecimal():
            counts = stages.setdefault('.'.join(part), {})
            counts[stage] = counts.get(stage, 0) + 1
    return {part: list(counts.values()) for part, counts in stages.items()}


def write_coverage(rows: List[CoverageRow], path: str) -> None:
    """Writes the coverage table as JSON: a list of dictionaries."""
    write_text(path, json.dumps([{**row._asdict(), 'quantized': row.quantized} for row in rows], indent=1))
