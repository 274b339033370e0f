"""Loads the detector of a config and a checkpoint to experiment with, whichever framework it is of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Optional

from q3d_plugin.bench import Bench
from q3d_plugin.checkpoint_file import check_checkpoint_file
from q3d_plugin.frameworks import framework_of, open_adapter
from q3d_plugin.recipe import Recipe
from q3d_plugin.shipped import find_shipped

__all__ = ['open_bench']


def open_bench(
    config: str, checkpoint: str, options: Optional[Mapping[str, str]] = None, recipe: Optional[Recipe] = None
) -> Bench:
    """Builds the model of a config and loads a checkpoint, with the checks of the adapter.

    Args:
        config: A ``.py`` file (MMDetection3D) or a ``.yaml`` file (OpenPCDet), with Quant types, or the name
            of one that comes with the plugin.
        checkpoint: Float or quantized, or the name of one that comes with the plugin.
        options: Dotted keys of the config to change, and their values as text.
        recipe: In place of the config's recipe.

    Raises:
        Q3DError: Anything is missing or does not fit.
    """
    config, checkpoint = find_shipped(str(config)), find_shipped(str(checkpoint))
    framework = framework_of(config)
    check_checkpoint_file(checkpoint)
    open_adapter(framework)
    if framework == 'mmdet3d':
        from q3d_plugin.mmdet3d.bench import MMDet3DBench

        return MMDet3DBench(Path(config), checkpoint, options, recipe)
    from q3d_plugin.openpcdet.bench import OpenPCDetBench

    return OpenPCDetBench(Path(config), checkpoint, options, recipe)
