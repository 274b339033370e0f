"""The study's experiments with CenterPoint-Voxel: as recipes, whatever the framework calls its layers, and as
one table of their results beside the study's own figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from q3d_plugin import files
from q3d_plugin.analysis.run_files import target_of
from q3d_plugin.errors import Q3DError
from q3d_plugin.text import markdown_table

__all__ = ['NUSCENES', 'recipes_of', 'results_of', 'table']

NUSCENES: Dict[str, Tuple[float, Optional[float]]] = {
    'float': (0.5922, 0.6648),
    'dense W8A8, signed': (0.5793, 0.6491),
    'dense W8A8, unsigned': (0.5885, 0.6603),
    'dense W8A8, SmoothQuant 0.5 on all': (0.0332, 0.1086),
    'dense W8A8, SmoothQuant 0.5 on the backbone, head plain': (0.5889, 0.6607),
    'head W8A8, backbone float': (0.5891, 0.6607),
    'backbone W8A8, head float': (0.5912, 0.6630),
    'dense W8A8, SmoothQuant 0.5 on the head but the listed layers': (0.5881, None),
    'dense W8A8, SmoothQuant 0.5 on all but the listed layers': (0.5889, None),
}
"""The study's own mAP and NDS on nuScenes (OpenPCDet, cbgs_voxel0075_res3d_centerpoint, 8 bits), not measured
here; where it gives a range, the middle of it."""


TENSORRT: Dict[str, Any] = {'target': 'tensorrt', 'activation.unsigned': False}
"""Signed integers, all that TensorRT has."""
OPENVINO: Dict[str, Any] = {'target': 'openvino', 'activation.unsigned': 'auto'}
"""Unsigned integers behind a ReLU."""
SIMULATION: Dict[str, Any] = {'target': 'simulation', 'activation.unsigned': 'auto'}
"""The same in widths, or with scales from the running input, that no engine here runs."""


def _of_bits(weight: int, activation: int, *words: str, **changes: Any) -> Dict[str, Any]:
    """Everything quantized, with these widths."""
    title = ', '.join([f'W{weight}A{activation}', *words])
    target = OPENVINO if (weight, activation) == (8, 8) else SIMULATION
    return {'name': title, **target, 'weight.bits': weight, 'activation.bits': activation, **changes}


def recipes_of(
    sparse: Sequence[str],
    backbone: Sequence[str],
    head: Sequence[str],
    listed: Sequence[str],
    fragile: Sequence[str],
) -> List[Dict[str, Any]]:
    """Named recipes for ``q3d sweep``; each is what it changes of the config's recipe, its target with it.

    The first part is the study's own table: only the dense layers are quantized, and SmoothQuant takes its
    scales from the running input (dynamic). The study's activations were unsigned behind a ReLU, except where
    it says otherwise. The second part is what the study left open: the sparse backbone, static scales,
    searched alpha, bit widths.

    Args:
        sparse: Patterns of the sparse backbone.
        backbone: Patterns of the dense backbone and neck.
        head: Patterns of the head.
        listed: Head layers that the study found to have a large error between float and quantized.
        fragile: First and last layers, which LiDAR-PTQ and most of the literature keep float.
    """
    plain = [dict(layers=list(listed), alpha=None)]
    dense, search = list(sparse), dict(alpha='search')

    def smoothed(**changes: Any) -> Dict[str, Any]:
        return {**SIMULATION, 'smoothquant': dict(alpha=0.5, mode='dynamic', **changes)}

    recipes = [
        dict(name='dense W8A8, signed', **TENSORRT, skip=dense),
        dict(name='dense W8A8, unsigned', **OPENVINO, skip=dense),
        dict(name='dense W8A8, SmoothQuant 0.5 on all', **smoothed(), skip=dense),
        dict(
            name='dense W8A8, SmoothQuant 0.5 on the backbone, head plain',
            **smoothed(layers=backbone),
            skip=dense,
        ),
        dict(name='head W8A8, backbone float', **OPENVINO, skip=[*sparse, *backbone]),
        dict(name='backbone W8A8, head float', **OPENVINO, skip=[*sparse, *head]),
        dict(
            name='dense W8A8, SmoothQuant 0.5 on the head but the listed layers',
            **smoothed(layers=head, overrides=plain),
            skip=dense,
        ),
        dict(
            name='dense W8A8, SmoothQuant 0.5 on all but the listed layers',
            **smoothed(overrides=plain),
            skip=dense,
        ),
        dict(name='dense W8A8, SmoothQuant 0.5, listed layers float', **smoothed(), skip=[*sparse, *listed]),
        dict(
            name='dense W8A8, static SmoothQuant 0.5 on all',
            **OPENVINO,
            smoothquant=dict(alpha=0.5),
            skip=dense,
        ),
        dict(name='dense W8A8, static SmoothQuant searched', **OPENVINO, smoothquant=search, skip=dense),
        dict(name='W8A8, signed', **TENSORRT),
        _of_bits(8, 8),
        _of_bits(8, 8, 'SmoothQuant searched', smoothquant=search),
        _of_bits(16, 8),
        _of_bits(8, 16),
        _of_bits(16, 4),
        _of_bits(8, 4),
        _of_bits(4, 16),
        _of_bits(3, 16),
        _of_bits(2, 16),
    ]
    for activation in (8, 4):
        recipes += [
            _of_bits(4, activation),
            _of_bits(4, activation, 'SmoothQuant searched', smoothquant=search),
            _of_bits(4, activation, 'fragile layers float', skip=fragile),
            _of_bits(
                4, activation, 'SmoothQuant searched, fragile layers float', smoothquant=search, skip=fragile
            ),
        ]
    return recipes


def results_of(folder: Path) -> Dict[str, Dict[str, Any]]:
    """mAP, NDS and target of every finished recipe of a sweep; under ``float`` those of the float model.

    Args:
        folder: Where ``q3d sweep`` wrote.

    Raises:
        Q3DError: There is no sweep with mAP.
    """
    content = files.read_json(folder / 'sweep.json', str(folder))
    found = [('float', content.get('float'), '')]
    found += [(e['name'], e.get('result'), target_of(e.get('recipe'))) for e in content['entries']]
    out = {
        name: {'mAP': result['mAP'], 'NDS': result.get('NDS'), 'target': target}
        for name, result, target in found
        if result and result.get('mAP') is not None
    }
    if not out:
        raise Q3DError(f'{folder}: it has no result with mAP yet; q3d sweep --metric map makes them')
    return out


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A Markdown table: a line for each recipe, two columns for each sweep, two for the study's own figures.

    Args:
        found: Title -> results of a sweep, as :func:`results_of` gives them.
    """

    def cells(values: Sequence[Optional[float]]) -> List[str]:
        return ['' if v is None else f'{100 * v:.2f}' for v in values]

    columns = [*found, 'the study, nuScenes (theirs)']
    header = ['recipe', 'target', *(f'{c}: {m}' for c in columns for m in ('mAP', 'NDS'))]
    lines = []
    for name in dict.fromkeys(name for results in found.values() for name in results):
        known = [results.get(name, {}) for results in found.values()]
        line = [name, ', '.join(dict.fromkeys(r['target'] for r in known if r))]
        for result in known:
            line += cells([result.get('mAP'), result.get('NDS')])
        lines.append(line + cells(NUSCENES.get(name, (None, None))))
    return markdown_table(header, lines)
