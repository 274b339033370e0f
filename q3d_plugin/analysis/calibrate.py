"""Calibration for measurements: NaN and Inf in the inputs of layers are counted, and do not end it."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

from tqdm import tqdm

from q3d_plugin import lifecycle
from q3d_plugin.bench import Bench
from q3d_plugin.quantizer import Mode
from q3d_plugin.recipe import Recipe

__all__ = ['Calibrated', 'calibrate']


@dataclass(frozen=True)
class Calibrated:
    """How a calibration went.

    Attributes:
        frames: How many there were.
        nonfinite: Layer -> in how many of them its input held NaN or Inf.
        left_float: Those of these layers that stay float, because no other frame gave them a range.
    """

    frames: int = 0
    nonfinite: Dict[str, int] = field(default_factory=dict)
    left_float: Tuple[str, ...] = ()

    def notes(self) -> Dict[str, str]:
        """Layer -> what was done with it, of the layers whose input held NaN or Inf.

        Examples:
            >>> Calibrated(4, {'neck': 1, 'head': 4}, ('head',)).notes()['neck']
            'NaN or Inf came to it in 1 of 4 calibration frames: its range is of the others'
        """
        done = {True: 'left float', False: 'its range is of the others'}
        return {
            name: f'NaN or Inf came to it in {count} of {self.frames} calibration frames: '
            + done[name in self.left_float]
            for name, count in self.nonfinite.items()
        }

    def warning(self) -> str:
        """Says what a run would do; empty where all inputs were finite."""
        if not self.nonfinite:
            return ''
        layers = ', '.join(self.nonfinite)
        return (
            f'NaN or Inf came to {len(self.nonfinite)} layers in calibration ({len(self.left_float)} of them '
            f'in every frame that they saw, so that they are left float): {layers}. A run stops there: check '
            'the checkpoint and the frames, or skip these layers'
        )


def calibrate(
    bench: Bench, recipe: Recipe, frames: Optional[Iterable] = None, title: str = 'calibration'
) -> Calibrated:
    """Gives a detector the float weights of its checkpoint, the quantizers of a recipe and their ranges.

    It is the calibration of a run, except that a frame whose NaN or Inf comes to a layer does not end it: the
    frame is not counted for this layer. A layer that no frame is left for stays float.

    Args:
        bench: Of a float checkpoint.
        recipe: What to make.
        frames: Calibration frames; those that the recipe names where None.
        title: For the progress bar.

    Raises:
        Q3DError: The recipe does not fit the model, the checkpoint is a quantized one, or there are no
            frames.
    """
    bench.prepare(dataclasses.replace(recipe, mode='float'))
    bench.configure(recipe)
    if frames is None:
        spec = recipe.calibration
        frames = bench.frames(spec.split, spec.frames, spec.seed)
    activations = [q for q in lifecycle.quantizers(bench.model) if not q.per_channel]
    nonfinite: Counter = Counter()
    whole = bench.run if bench.second_stage else bench.forward

    def forward(batch: Any) -> Any:
        returned = whole(batch)
        for quantizer in activations:
            if not quantizer.finite:
                nonfinite.update(quantizer.owners)
                quantizer.finite = True  # the pass would end here otherwise
        return returned

    batches = tqdm(frames, desc=title, unit='frame', leave=False)
    seen = lifecycle.calibrate(bench.model, batches, forward, logger=bench.logger)
    inputs = {name: u.input_quantizer for name, u in lifecycle.units(bench.model) if name in nonfinite}
    left = tuple(name for name, quantizer in inputs.items() if quantizer.mode is Mode.FLOAT)
    return Calibrated(seen, {name: nonfinite[name] for name in inputs}, left)
