"""The record of a run: what the report shows of it."""

import json
import os
import time
from collections.abc import Mapping
from typing import Any, Dict, List

from torch import nn

from q3d_plugin.checkpoints import stamp
from q3d_plugin.coverage import coverage, write_coverage
from q3d_plugin.files import write_json, write_text
from q3d_plugin.layers.model import quantizers
from q3d_plugin.quantizer import Role
from q3d_plugin.recipe import Recipe

__all__ = ['histograms', 'write_run']


def histograms(model: nn.Module) -> List[Dict[str, Any]]:
    """What calibration saw of every distinct input, compact: one dictionary for each activation quantizer.

    Args:
        model: Calibrated here; quantizers of a checkpoint have seen nothing.
    """
    rows = []
    for quantizer in quantizers(model):
        if quantizer.role is Role.WEIGHT or quantizer.seen is None:
            continue
        rows.append(
            {
                'name': quantizer.owners[0] if quantizer.owners else quantizer.name,
                'owners': list(quantizer.owners),
                'bits': quantizer.num_bits,
                'unsigned': quantizer.unsigned,
                'dynamic': quantizer.dynamic,
                'amax': quantizer._amax.item() if quantizer.has_range else None,
                **quantizer.seen,
            }
        )
    return rows


def write_run(folder: str, model: nn.Module, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Writes the files that ``q3d report`` shows of a run: run.json, coverage.json and histograms.json.

    ``time`` in run.json, in seconds since the epoch, tells detections of this run from older ones.

    Args:
        folder: Of the run.
        model: Configured, and calibrated unless the recipe's mode is float.
        recipe: Of the run.
        facts: Framework, config, checkpoint, data set and the folder that detections are written to
            (``predictions``, where it is known), in plain data.
    """
    write_json(os.path.join(folder, 'run.json'), {**facts, 'time': time.time(), **stamp(recipe)})
    write_coverage(coverage(model), os.path.join(folder, 'coverage.json'))
    rows = histograms(model)
    if rows:
        write_text(os.path.join(folder, 'histograms.json'), json.dumps(rows))
