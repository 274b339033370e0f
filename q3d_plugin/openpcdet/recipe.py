"""The recipe in OpenPCDet's YAML: the schema of :mod:`q3d_plugin.recipe`, in upper case, ``MODEL.QUANT``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Dict, Optional

import yaml

from q3d_plugin.errors import Q3DError, near_matches
from q3d_plugin.recipe import Place, Recipe

__all__ = [
    'PATH',
    'check_config_file',
    'check_model_cfg',
    'quant_names',
    'recipe_from',
]

PATH = 'MODEL.QUANT'
"""Where the recipe stands in the YAML file."""


def recipe_from(given: Optional[Mapping]) -> Recipe:
    """Validates what stands under ``MODEL.QUANT``.

    Args:
        given: The dictionary with upper-case keys; None and missing keys take the defaults.

    Raises:
        Q3DError: Anything is unknown, out of range or of the wrong type; the path is named as in the file.

    Examples:
        >>> recipe_from({'MODE': 'qat', 'WEIGHT': {'BITS': 4}}).weight.bits
        4
    """
    # OpenPCDet's configs are made of EasyDict, which no weights_only load takes.
    return Recipe.from_dict(_without_easydict(given), Place(PATH, upper=True))


def _without_easydict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_easydict(v) for k, v in value.items()}
    return [_without_easydict(v) for v in value] if isinstance(value, (list, tuple)) else value


def quant_names(model_cfg: Mapping) -> Dict[str, str]:
    """The Quant names of a model's config by their place, the detector's first.

    Examples:
        >>> quant_names({'NAME': 'QuantCenterPoint', 'VFE': {'NAME': 'MeanVFE'}})
        {'MODEL.NAME': 'QuantCenterPoint'}
    """
    found = {'MODEL.NAME': model_cfg.get('NAME')}
    found.update({f'MODEL.{k}.NAME': v.get('NAME') for k, v in model_cfg.items() if isinstance(v, Mapping)})
    return {k: v for k, v in found.items() if isinstance(v, str) and v.startswith('Quant')}


def check_model_cfg(model_cfg: Mapping) -> Optional[Recipe]:
    """Checks that the recipe and the Quant names of a config go together.

    Args:
        model_cfg: ``MODEL`` of the config.

    Returns:
        Recipe: None for a float model.

    Raises:
        Q3DError: One is there without the other, or the recipe cannot work.
    """
    names = quant_names(model_cfg)
    if 'QUANT' not in model_cfg:
        if not names:
            return None
        for key in model_cfg:
            if near_matches(str(key).upper(), ['QUANT']).startswith('; did you mean'):
                raise Q3DError(f"MODEL.{key}: unknown key; did you mean 'QUANT'?")
        place, name = next(iter(names.items()))
        raise Q3DError(
            f'{PATH}: missing, but {place} is {name!r}: write the recipe there, such as QUANT: {{MODE: ptq}}'
            ', or take the names without Quant'
        )
    recipe = recipe_from(model_cfg['QUANT'])
    detector = str(model_cfg.get('NAME'))
    parts = {k: v['NAME'] for k, v in model_cfg.items() if isinstance(v, Mapping) and v.get('NAME')}
    if not any(place != 'MODEL.NAME' for place in names):
        listed = ', '.join(f'MODEL.{k}.NAME is {v!r}' for k, v in parts.items())
        raise Q3DError(
            f'{PATH}: there is a recipe, but no part of the model has a Quant name, so nothing would be '
            f'quantized ({listed}). Write Quant before the NAME of each part to quantize, such as '
            "BACKBONE_2D: {NAME: QuantBaseBEVBackbone}, and NAME: 'Quant"
            f"{detector.removeprefix('Quant')}'"
        )
    if not detector.startswith('Quant'):
        raise Q3DError(
            f"MODEL.NAME: {detector!r} was given; 'Quant{detector}' would work: it is the detector that "
            f'reads {PATH}'
        )
    return recipe


def check_config_file(path: Path) -> None:
    """Checks a config before OpenPCDet's script reads it: its base, its Quant names, its recipe.

    Args:
        path: The YAML file; what its ``_BASE_CONFIG_`` names is relative to the working directory.

    Raises:
        Q3DError: The file or its base cannot be read, or recipe and Quant names do not go together.
    """
    from easydict import EasyDict
    from pcdet.config import cfg_from_yaml_file

    try:
        content = yaml.safe_load(Path(path).read_text())
        if not isinstance(content, Mapping):
            raise Q3DError(f'config {str(path)!r} is no config: it holds no keys')
        _check_bases(content, path)
        model_cfg = cfg_from_yaml_file(str(path), EasyDict()).get('MODEL')
    except yaml.YAMLError as error:
        raise Q3DError(f'config {str(path)!r} is no YAML: {" ".join(str(error).split())}') from error
    if not isinstance(model_cfg, Mapping):
        raise Q3DError(f'config {str(path)!r} has no MODEL, nor has its _BASE_CONFIG_')
    check_model_cfg(model_cfg)
    check_registered(model_cfg)


def _check_bases(value: Any, path: Path, place: str = '') -> None:
    if not isinstance(value, Mapping):
        return
    for key, item in value.items():
        if key == '_BASE_CONFIG_' and not Path(str(item)).is_file():
            raise Q3DError(
                f'config {str(path)!r}: {place}_BASE_CONFIG_: {str(item)!r} is not a file (looked in '
                f'{Path.cwd()}; OpenPCDet takes it relative to its tools folder)'
            )
        _check_bases(item, path, f'{place}{key}.')


def check_registered(model_cfg: Mapping) -> None:
    """Raises :class:`Q3DError` for the first Quant name that OpenPCDet's registries do not have."""
    from q3d_plugin.openpcdet.registries import REGISTRIES, registry_of

    for place, name in quant_names(model_cfg).items():
        section = place.split('.')[-2] if place.count('.') > 1 else 'NAME'
        known = [n for n in registry_of(section) if n.startswith('Quant')] if section in REGISTRIES else []
        if name not in known:
            raise Q3DError(
                f'{place}: {name!r} is no type that this plugin registers'
                + (near_matches(name, known) if known else f'; no part under {section} has a Quant type')
            )
