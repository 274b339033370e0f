"""The life of a quantized model: configure, load, calibrate, test or train. Both adapters run on this."""

import contextlib
import copy
import json
import logging
import math
import os
import pickle
import struct
import time
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from q3d_plugin import __version__
from q3d_plugin.calibration import (
    InputStatistics,
    any_of_ranks,
    collect,
    compute_ranges,
    evaluating,
    feed,
    from_all_ranks,
)
from q3d_plugin.errors import Q3DError, near_matches
from q3d_plugin.files import write_text
from q3d_plugin.layers import REGISTRY, QuantUnit, QuantWeightLayer, is_converted, why_not
from q3d_plugin.quantizer import Mode, Quantizer
from q3d_plugin.recipe import Recipe, differences
from q3d_plugin.transforms import smooth
from q3d_plugin.transforms.fold import fold_state_dict
from q3d_plugin.transforms.graph import ChannelGraph, tensors_in
from q3d_plugin.transforms.insert import apply_recipe

__all__ = [
    'CoverageRow',
    'calibrate',
    'check_checkpoint_file',
    'check_patterns',
    'check_recipe_of',
    'check_state_dict',
    'configure',
    'coverage',
    'coverage_table',
    'is_calibrated',
    'is_quantized_checkpoint',
    'quantizers',
    'save_checkpoint',
    'set_enabled',
    'stamp',
    'units',
    'with_progress',
    'write_coverage',
    'write_run',
]

META_KEY = 'q3d'
"""Where a checkpoint's ``meta`` holds the recipe."""

_NO_DATA = 'saw no data during calibration'
_logger = logging.getLogger(__name__)

_ONCE = (
    'calibration: {} was given, which can be read once; SmoothQuant reads the batches twice, so a list or a '
    'loader would work'
)


def units(model: nn.Module) -> List[Tuple[str, QuantUnit]]:
    """Every layer, addition and concatenation of ``model`` that can be quantized, with its dotted name."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, QuantUnit)]


def quantizers(model: nn.Module) -> List[Quantizer]:
    """Every quantizer of ``model`` once, in the order of the modules."""
    return [m for m in model.modules() if isinstance(m, Quantizer)]


def configure(model: nn.Module, recipe: Recipe) -> None:
    """Gives ``model`` the quantizers that ``recipe`` asks for. Parameters are not touched.

    Args:
        model: A model with Quant types in it.
        recipe: Validated recipe.

    Raises:
        Q3DError: The model has no Quant types, or a pattern of the recipe matches no layer.
    """
    found = units(model)
    if not found:
        types = sorted({type(m).__name__ for _, m in model.named_children()})
        raise Q3DError(
            'recipe: the config has a recipe, but nothing in the model has a Quant type, so nothing would '
            f'be quantized; the parts of this model are {", ".join(types)}. Write Quant before the type of '
            "each part that is to be quantized, such as type='QuantSECOND'"
        )
    check_patterns(model, recipe)
    apply_recipe(model, recipe)
    if recipe.mode == 'float':
        set_enabled(model, False)


def check_patterns(model: nn.Module, recipe: Recipe, path: str = 'recipe') -> None:
    """Raises :class:`Q3DError` for the first pattern of ``recipe`` that means no layer of ``model``.

    Args:
        model: A model with Quant types in it.
        recipe: Validated recipe.
        path: Where the recipe stands in the config, for error messages.
    """
    found = units(model)
    weighted = [name for name, unit in found if isinstance(unit, QuantWeightLayer)]
    recipe.check_patterns([name for name, _ in found], path, weighted)


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Switches all quantizers on, or off (then ``model`` computes in float)."""
    for quantizer in quantizers(model):
        if enabled:
            quantizer.enable()
        else:
            quantizer.disable()


def is_calibrated(model: nn.Module) -> bool:
    """Whether every quantizer of ``model`` has a range or was left float."""
    return all(q.mode is not Mode.UNCALIBRATED for q in quantizers(model))


def calibrate(
    model: nn.Module,
    batches: Iterable,
    forward: Callable,
    names: Callable = None,
    logger: logging.Logger = None,
) -> int:
    """Takes statistics over ``batches`` and sets every range: activations first, then weights.

    A layer whose input never came stays float altogether, and is named in one warning. Where the recipe has
    layers smoothed, that comes first, in a pass of its own.

    Args:
        model: A configured model.
        batches: Batches of the framework's loader; read twice where layers are smoothed.
        forward: Called with each batch.
        names: Gives the name of a batch for messages.
        logger: Where the warning goes.

    Returns:
        int: Number of batches seen.

    Raises:
        Q3DError: There were no batches, or an activation holds NaN or Inf.
    """
    smoothed = _smooth(model, batches, forward, names, logger or _logger)
    activations = [q for q in quantizers(model) if not q.per_channel]
    weights = [q for q in quantizers(model) if q.per_channel]
    # Statistics are those of the float model: weights are let through while they are taken.
    for quantizer in weights:
        quantizer.disable()
        quantizer.used = False
    try:
        seen = collect(model, batches, forward, activations, names)
    finally:
        for quantizer in weights:
            quantizer.enable()
    if seen == 0 and smoothed:
        raise Q3DError(_ONCE.format(type(batches).__name__))
    if seen == 0:
        raise Q3DError('calibration: there is not one frame to calibrate on')
    empty = set(compute_ranges(activations))
    # A layer whose weight is read by other code, past its forward, has no quantizer in the way of anything.
    unused = {q for q, used in zip(weights, any_of_ranks([q.used for q in weights])) if not used}
    left = []
    for name, unit in units(model):
        weight = getattr(unit, 'weight_quantizer', None)
        idle = unit.input_quantizer in empty or weight in unused
        if idle:
            unit.float_reason = _NO_DATA
            left.append(name)
        if weight is not None:
            if idle:
                weight.leave_float()
            else:
                unit.calibrate_weight()
    if left:
        (logger or _logger).warning(
            f'{len(left)} layers saw no data during calibration and stay float: {", ".join(left)}'
        )
    return seen


@contextlib.contextmanager
def _quantizers_off(model: nn.Module) -> Iterator[None]:
    on = [q for q in quantizers(model) if not q._disabled]
    for quantizer in on:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in on:
            quantizer.enable()


def _smooth(
    model: nn.Module, batches: Iterable, forward: Callable, names: Optional[Callable], logger: logging.Logger
) -> int:
    """Smooths the layers that the recipe wants smoothed, and gives the number of batches that it read.

    What the model computes in float stays the same.
    """
    layers = {name: unit for name, unit in units(model) if isinstance(unit, QuantWeightLayer)}
    wanted = {name: layer for name, layer in layers.items() if layer.smooth_spec is not None}
    if not wanted:
        return 0
    if iter(batches) is batches:
        raise Q3DError(_ONCE.format(type(batches).__name__))
    searched = [n for n, unit in wanted.items() if unit.smooth_spec.alpha == 'search' and unit.searchable]
    graph, statistics = ChannelGraph(layers), InputStatistics(layers, searched)
    first: Dict[str, Any] = {}

    def watched(batch):
        if not first:
            # Kept for the probe; a forward pass may write into its batch.
            first['batch'] = copy.deepcopy(batch)
        with graph.watching() as watch:
            returned = forward(batch)
            watch.returned(returned)
        if 'seen' not in first:
            values = [t.detach().clone() for t in tensors_in(returned)]
            first['seen'] = dict(statistics.amax), values

    def again():
        probe, batch = InputStatistics(layers), copy.deepcopy(first['batch'])
        with probe.attached(), evaluating(model):
            returned = list(tensors_in(forward(batch)))
        return probe.amax, returned

    with _quantizers_off(model):
        with statistics.attached():
            seen = feed(model, batches, watched, statistics.infinite, names)
        if seen == 0:
            return 0
        statistics.merge_ranks()
        for other in from_all_ranks(graph.state()):
            graph.merge(other)
        smooth.agree_(graph, layers)
        if smooth.probe_(graph, layers, again if first else None, first.get('seen'), from_all_ranks):
            logger.warning(
                'SmoothQuant: outputs of some layers are read by code that cannot be watched, so scales of '
                'the layers that follow stay explicit multiplications (see the coverage table)'
            )
    joint = smooth.joint_amax(graph, wanted, statistics.amax)
    errors: Dict[str, Any] = {}
    for mine in from_all_ranks(smooth.sum_errors(wanted, joint, statistics)):
        for name, error in mine.items():
            errors[name] = errors[name] + error if name in errors else error
    smooth.smooth_(graph, layers, joint, smooth.alphas_of(wanted, joint, errors))
    return seen


class CoverageRow(NamedTuple):
    """One line of the coverage table.

    Attributes:
        smoothquant: Where the layer is smoothed: ``alpha``, ``mode``, ``producers`` (the layers that have the
            inverse scales) and ``explicit`` (whether its input is multiplied). Not a column of the table.
    """

    name: str
    kind: str
    weight: str
    activation: str
    shared_with: str
    note: str
    smoothquant: Optional[Dict[str, Any]] = None

    @property
    def quantized(self) -> bool:
        """Whether anything of the layer is quantized."""
        return bool(self.weight or self.activation)


def _describe(quantizer: Optional[Quantizer], disabled_word: str = '') -> str:
    if quantizer is None or quantizer.mode is Mode.FLOAT or quantizer._disabled:
        return disabled_word
    bits = quantizer.num_bits
    if quantizer.per_channel:
        return f'int{bits} per channel'
    if quantizer.mode is Mode.UNCALIBRATED:
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
            off = any(q._disabled for q in module.quantizers())
            note = module.float_reason or (_NO_DATA if idle else '')
            note = note or ('switched off' if off and not (weight or activation) else '')
            smoothed, words = _smoothing_of(module)
            note = '; '.join(part for part in (note, words) if part)
            shared = '' if shared == name else shared
            rows.append(CoverageRow(name, module.kind, weight, activation, shared, note, smoothed))
        elif isinstance(module, Quantizer):
            continue
        elif isinstance(module, _BatchNorm):
            rows.append(
                CoverageRow(name, type(module).__name__, '', '', '', 'no layer before it to fold into')
            )
        elif not is_converted(module) and _own_weights(module):
            reason = why_not(module) or 'its part of the model has no Quant type'
            rows.append(CoverageRow(name, type(module).__name__, '', '', '', reason))
    return rows


def _smoothing_of(module: QuantUnit) -> Tuple[Optional[Dict[str, Any]], str]:
    """What is known of the smoothing of a unit: for JSON, and in words."""
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
    header = CoverageRow('layer', 'type', 'weight', 'input', 'input shared with', 'note')
    cells = [header, *rows]
    widths = [max(len(r[i]) for r in cells) for i in range(header.index('note') + 1)]
    lines = ['  '.join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in cells]
    lines.insert(1, '  '.join('-' * w for w in widths))
    layers = [r for r in rows if r.kind not in ('Add', 'Concat')]
    done = sum(r.quantized for r in layers)
    others = sum(r.quantized for r in rows if r.kind in ('Add', 'Concat'))
    lines.append(f'{done} of {len(layers)} layers quantized, and {others} additions and concatenations')
    return '\n'.join(lines)


def is_quantized_checkpoint(state_dict: Mapping) -> bool:
    """Whether ``state_dict`` holds ranges."""
    return any(k.endswith('_quantizer._state') for k in state_dict)


def check_checkpoint_file(path: str) -> None:
    """Raises :class:`Q3DError` where ``path`` is missing or a checkpoint that was cut off; URLs are not
    looked at."""
    if '://' in str(path):
        return
    file = Path(path).expanduser()
    if not file.is_file():
        raise Q3DError(f'checkpoint {str(path)!r} is not a file (looked in {Path.cwd()})')
    with file.open('rb') as f:
        start = f.read(4)
    if len(start) < 4:
        raise Q3DError(f'checkpoint {str(path)!r} has only {len(start)} bytes: copy it again')
    if start.startswith(b'PK') and not zipfile.is_zipfile(file):
        raise Q3DError(
            f'checkpoint {str(path)!r} is truncated ({file.stat().st_size} bytes, its end is '
            'missing): copy it again'
        )
    if not start.startswith((b'PK', b'\x80')):
        raise Q3DError(f'checkpoint {str(path)!r} is not a PyTorch checkpoint: it starts with {start!r}')
    try:
        torch.load(file, map_location='meta', weights_only=True)
    except pickle.UnpicklingError:
        pass  # objects that the framework's loader may allow; it decides
    except (RuntimeError, EOFError, OSError, IndexError, struct.error) as error:
        # A file in torch's old format that was cut off ends in any of these, some without a word.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Q3DError(f'checkpoint {str(path)!r} cannot be read ({reason}): copy it again') from error


_OWN_KEYS = ('_quantizer._amax', '_quantizer._state', '.smooth_alpha', '.smooth_scale', '.smooth_weight')


def _is_quantizer_key(key: str) -> bool:
    return f'.{key}'.endswith(_OWN_KEYS)


def check_state_dict(model: nn.Module, state_dict: Mapping, source: str = 'checkpoint') -> Dict[str, Any]:
    """Checks that a checkpoint belongs to ``model`` before it is loaded: every parameter is there, of its
    shape.

    Args:
        model: A configured model with Quant types.
        state_dict: Float or quantized; not changed.
        source: What to call it in messages.

    Returns:
        dict: The state dict with BatchNorm folded, as it will be loaded.

    Raises:
        Q3DError: Parameters are missing or have another shape, or (quantized) ranges are missing or left
            over.
    """
    folded = type(state_dict)(state_dict)
    for name, module in model.named_modules():
        if hasattr(module, '_q3d_folds'):
            fold_state_dict(module, folded, f'{name}.' if name else '', module._q3d_folds)
    mine = model.state_dict()
    weights = {k: v for k, v in mine.items() if not _is_quantizer_key(k) and 'num_batches_tracked' not in k}
    wrong = [
        k
        for k, v in weights.items()
        if k in folded
        and tuple(folded[k].shape) != tuple(v.shape)
        and not _permutes_to(folded[k].shape, v.shape)
    ]
    if wrong:
        raise Q3DError(
            f'{source}: of another model: {wrong[0]!r} has the shape {tuple(folded[wrong[0]].shape)}, the '
            f'model needs {tuple(weights[wrong[0]].shape)} (and {len(wrong) - 1} more differ)'
        )
    missing = [k for k in weights if k not in folded]
    if missing:
        has = f'it has {len(state_dict)} entries, {len(weights) - len(missing)} of the {len(weights)} needed'
        near = near_matches(missing[0], [k for k in state_dict if not _is_quantizer_key(k)][:2000], 1)
        raise Q3DError(
            f'{source}: of another model: {missing[0]!r} is missing (and {len(missing) - 1} more; {has})'
            + (near if near.startswith('; did') else '')
        )
    if is_quantized_checkpoint(state_dict):
        needed = {k for k in mine if _is_quantizer_key(k)}
        given = {k for k in state_dict if _is_quantizer_key(k)}
        if needed != given:
            lacking, extra = sorted(needed - given), sorted(given - needed)
            raise Q3DError(
                f'{source}: its quantizers are not those of the recipe: '
                + (f'{lacking[0]!r} and {len(lacking) - 1} more have no range in it' if lacking else '')
                + ('; ' if lacking and extra else '')
                + (f'{extra[0]!r} and {len(extra) - 1} more are not in the recipe' if extra else '')
                + '. Use the recipe it was made with, or calibrate the float checkpoint anew'
            )
    return folded


def _permutes_to(given, wanted) -> bool:
    """Whether a weight of spconv 1.x, (k, k, k, in, out), becomes the wanted one, (out, k, k, k, in)."""
    return len(given) > 3 and (given[-1], *given[:-1]) == tuple(wanted)


def check_recipe_of(
    meta: Optional[Mapping], recipe: Recipe, source: str = 'checkpoint', path: str = 'recipe'
) -> None:
    """Raises :class:`Q3DError` where a quantized checkpoint was made with another recipe.

    ``mode`` and ``calibration`` may differ: a PTQ checkpoint is a fine start for QAT, and the ranges are
    taken.

    Args:
        meta: The checkpoint's ``meta``.
        recipe: The config's recipe.
        source: What to call the checkpoint in messages.
        path: Where the recipe stands in the config.
    """
    given = ((meta or {}).get(META_KEY) or {}).get('recipe')
    if given is None:
        raise Q3DError(f'{source}: it has ranges but no recipe; it was not saved by this plugin')
    mine = recipe.to_dict()
    found = [
        d
        for key in [*mine, *(k for k in given if k not in mine)]
        if key not in ('mode', 'calibration')
        for d in differences(given.get(key), mine.get(key), f'{path}.{key}')
    ]
    if found:
        raise Q3DError(
            f'{source}: it was quantized with another recipe (checkpoint and config): {"; ".join(found)}. '
            'Use the recipe it was made with, or calibrate the float checkpoint anew'
        )


def stamp(recipe: Recipe) -> Dict[str, Any]:
    """What the ``meta`` of a quantized checkpoint holds under :data:`META_KEY`."""
    return {'recipe': recipe.to_dict(), 'version': __version__}


def save_checkpoint(
    model: nn.Module, recipe: Recipe, path: str, meta: Mapping = None, state_key: str = 'state_dict'
) -> None:
    """Writes weights, ranges and recipe; the file appears whole or not at all.

    Args:
        model: A calibrated model.
        recipe: The recipe it was calibrated with.
        path: Where to write; the folder exists.
        meta: What else the ``meta`` holds.
        state_key: Where the framework looks for the weights.
    """
    # state_dict() keeps the layout versions in _metadata, which spconv's loaders ask for.
    state = model.state_dict()
    for key, value in state.items():
        state[key] = value.detach().cpu()
    content = {'meta': {**(meta or {}), META_KEY: stamp(recipe)}, state_key: state}
    temporary = f'{path}.{uuid.uuid4().hex[:8]}.tmp'
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def write_coverage(rows: List[CoverageRow], path: str) -> None:
    """Writes the coverage table as JSON: a list of dictionaries."""
    write_text(path, json.dumps([{**row._asdict(), 'quantized': row.quantized} for row in rows], indent=1))


def histograms(model: nn.Module) -> List[Dict[str, Any]]:
    """What calibration saw of every distinct input, compact: one dictionary for each activation quantizer.

    Args:
        model: Calibrated here; quantizers of a checkpoint have seen nothing.
    """
    rows = []
    for quantizer in quantizers(model):
        if quantizer.per_channel or quantizer.seen is None:
            continue
        ranged = quantizer.mode in (Mode.SIGNED, Mode.UNSIGNED)
        rows.append(
            {
                'name': quantizer.owners[0] if quantizer.owners else quantizer.name,
                'owners': list(quantizer.owners),
                'bits': quantizer.num_bits,
                'unsigned': quantizer.unsigned,
                'amax': quantizer._amax.item() if ranged else None,
                **quantizer.seen,
            }
        )
    return rows


def write_run(folder: str, model: nn.Module, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Writes what ``tools/report.py`` shows of a run: run.json, coverage.json and histograms.json.

    Args:
        folder: Of the run.
        model: Configured, and calibrated unless the recipe's mode is float.
        recipe: Of the run.
        facts: Framework, config, checkpoint, data set, in plain data.
    """
    write_text(os.path.join(folder, 'run.json'), json.dumps({**facts, **stamp(recipe)}, indent=1))
    write_coverage(coverage(model), os.path.join(folder, 'coverage.json'))
    rows = histograms(model)
    if rows:
        write_text(os.path.join(folder, 'histograms.json'), json.dumps(rows))


class _Progress:
    """Batches with a line of progress in the log; can be read several times."""

    def __init__(self, batches: Iterable, logger: logging.Logger, who: str) -> None:
        self.batches, self.logger, self.who = batches, logger, who

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator:
        total = len(self)
        step, start = max(1, total // 10), time.time()
        for i, batch in enumerate(self.batches):
            yield batch
            if (i + 1) % step == 0 or i + 1 == total:
                rate = (time.time() - start) / (i + 1)
                self.logger.info(f'{self.who}: calibration [{i + 1}/{total}] {rate:.2f} s a batch')


def with_progress(batches: Iterable, logger: logging.Logger, who: str) -> Iterable:
    """The batches (a sized iterable), with a line of progress in the log about every tenth of the way.

    Args:
        batches: What to iterate over; as often as ``batches`` can be.
        logger: Where the lines go.
        who: What the lines begin with.
    """
    return _Progress(batches, logger, who)


def quantizable_types() -> List[str]:
    """Names of the float layer types that have a quantized version."""
    return sorted(c.__name__ for c in REGISTRY)
