"""Everything about one config: built in float and quantized, run, and compared."""

import contextlib
import copy
import resource
import time
import traceback
from typing import Any, List, Optional

import torch
from torch import nn

from q3d_plugin import lifecycle
from q3d_plugin.adapter import Adapter
from q3d_plugin.errors import Q3DError
from q3d_plugin.recipe import Recipe
from q3d_plugin.zoo import compare, layers, weights
from q3d_plugin.zoo.rows import Row, first_line

__all__ = ['RECIPE', 'examine']

RECIPE = {'include': ['*'], 'weight': {'calibrator': 'max'}, 'activation': {'calibrator': 'max'}}
"""The recipe of every config: also what stays float by default is quantized, and so compared."""


def examine(adapter: Adapter, config: str, forward: bool, int8: bool = False) -> Row:
    """Examines one config. Exceptions of the plugin end up in the row, as those of the framework.

    Args:
        adapter: Of the config's framework.
        config: Its path below the adapter's folder.
        forward: Whether to run the models.
        int8: Whether to calibrate the quantized one on the frame and run it in INT8, too.
    """
    row, start = Row(adapter.name, config), time.time()
    try:
        _examine(adapter, config, forward, int8, row)
    except Exception:
        row.ours = traceback.format_exc()
    row.seconds = time.time() - start
    row.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return row


def _examine(adapter: Adapter, config: str, forward: bool, int8: bool, row: Row) -> None:
    torch.manual_seed(0)
    try:
        cfg = adapter.read(adapter.folder / config)
        reference = adapter.build(cfg)
    except Exception as error:
        # Of what the adapter says of a config, the row needs the framework's reason alone.
        row.float_build = first_line(error.__cause__ or error, adapter.folder.parent)
        return
    row.float_build = ''
    weights.randomize(reference)
    row.quant_build = 'failed'
    model = adapter.build(adapter.quantized_config(cfg, RECIPE))
    lifecycle.configure(model, Recipe.from_dict(RECIPE))
    layers.count_layers(model, row)
    names = layers.comparable(model)
    row.comparable = len(names)
    expected, frame = {}, None
    if forward:
        try:
            frame = adapter.synthetic_batch(cfg, reference)
        except Exception as error:
            row.forward = f'no frame: {first_line(error)}'
        else:
            handles = weights.settle(reference)
            expected, row.forward = compare.record(adapter, reference, frame, names)
            for handle in handles:
                handle.remove()
    row.compared = len(expected)
    # A copy, with the layout versions in its _metadata, which spconv's loaders ask for.
    state = copy.deepcopy(reference.state_dict())
    adapter.load(model, copy.deepcopy(state))
    lifecycle.configure(model, Recipe.from_dict(RECIPE))
    row.quant_build = ''
    if frame is None:
        return
    lifecycle.set_enabled(model, False)
    weights.spoil_idle(model, expected)
    got, stopped = compare.record(adapter, model, frame, names)
    if stopped != row.forward:
        raise Q3DError(f'the float model stopped at {row.forward!r}, the quantized one at {stopped!r}')
    row.difference, row.worst = compare.compare(expected, got)
    if row.difference is not None and not row.same:
        row.double = _difference_in_double(adapter, reference, model, frame, names, set(expected))
        if row.double is None:
            weights.jitter(reference)
            row.jitter = compare.compare(expected, compare.record(adapter, reference, frame, names)[0])[0]
    if not int8 or not expected:
        return
    adapter.load(model, state)
    lifecycle.set_enabled(model, True)

    def forward_of(frame):
        # As far as the float model comes: what stops it stops calibration, too.
        with contextlib.suppress(Exception) if row.forward else contextlib.nullcontext():
            adapter.run(model, copy.deepcopy(frame))

    lifecycle.calibrate(model, [frame], forward_of)
    got, _ = compare.record(adapter, model, frame, names)
    row.int8 = compare.int8_error(expected, got)


def _difference_in_double(
    adapter: Adapter, reference: nn.Module, model: nn.Module, frame: Any, names: List[str], ran: set
) -> Optional[float]:
    """The difference of two models in double precision; None where they do not run as far as in single.

    BatchNorm is folded anew, without rounding to single precision.
    """
    both = []
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        adapter.load(model.double(), copy.deepcopy(reference.double().state_dict()))
        lifecycle.set_enabled(model, False)
        for net in (reference, model):
            both.append(compare.record(adapter, net, compare.in_double(frame), names)[0])
    finally:
        torch.set_default_dtype(default)
        reference.float()
        model.float()
    return compare.compare(*both)[0] if all(set(seen) == ran for seen in both) else None
