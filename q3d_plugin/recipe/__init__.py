"""The recipe: one validated schema, the same words in every framework.

A recipe is a plain dictionary in a config and a :class:`Recipe` in the program. Unknown keys, patterns that
match no layer, bit widths out of range, calibrators that do not exist and what the target cannot run fail
before any data is read, with the full dotted path, what was given, and the nearest thing that would have
worked.
"""

from q3d_plugin.recipe.patterns import matches
from q3d_plugin.recipe.recipe import LayerFacts, Recipe, differences
from q3d_plugin.recipe.schema import Place, keys_of
from q3d_plugin.recipe.specs import (
    CALIBRATORS,
    WEIGHT_CALIBRATORS,
    ActivationSpec,
    CalibrationSpec,
    LayerPlan,
    Override,
    SmoothOverride,
    SmoothQuantSpec,
    SmoothSpec,
    WeightSpec,
)
from q3d_plugin.recipe.targets import FAMILIES, TARGETS, Target
from q3d_plugin.recipe.training import RANGE_KINDS, DistillationSpec, RangesSpec, ScheduleSpec, TrainingSpec

__all__ = [
    'CALIBRATORS',
    'FAMILIES',
    'RANGE_KINDS',
    'TARGETS',
    'WEIGHT_CALIBRATORS',
    'ActivationSpec',
    'CalibrationSpec',
    'DistillationSpec',
    'LayerFacts',
    'LayerPlan',
    'Override',
    'Place',
    'RangesSpec',
    'Recipe',
    'ScheduleSpec',
    'SmoothOverride',
    'SmoothQuantSpec',
    'SmoothSpec',
    'Target',
    'TrainingSpec',
    'WeightSpec',
    'differences',
    'keys_of',
    'matches',
]
