"""Skip lists by name: what others, or a sensitivity study, left float in a known detector.

A recipe names one among its patterns, ``skip=['preset:nvidia-bevfusion']``. A preset is written once for both
frameworks, whose modules have other names: each of its lines has alternatives.
"""

from collections.abc import Iterator, Sequence
from typing import Dict, NamedTuple, Tuple

from q3d_plugin.errors import Q3DError, near_matches
from q3d_plugin.recipe.patterns import matches
from q3d_plugin.recipe.schema import Check, Place, patterns

__all__ = ['PREFIX', 'PRESETS', 'Preset', 'PresetLine', 'described', 'expanded', 'missing', 'skips']

PREFIX = 'preset:'
"""What the name of a preset begins with in a list of patterns."""


class PresetLine(NamedTuple):
    """Layers that stay float for one reason.

    Attributes:
        patterns: Alternatives: the names that they have in one framework or another.
        reason: Why they stay float.
        optional: Whether a model may have no such layer, as one without cameras.
    """

    patterns: Tuple[str, ...]
    reason: str
    optional: bool = False


class Preset(NamedTuple):
    """A skip list.

    Attributes:
        lines: The layers.
        source: Who chose them, or the command that did.
    """

    lines: Tuple[PresetLine, ...]
    source: str


PRESETS: Dict[str, Preset] = {
    'nvidia-bevfusion': Preset(
        (
            PresetLine(
                ('pts_middle_encoder.conv_input', 'backbone_3d.conv_input'), 'first layer of the LiDAR branch'
            ),
            PresetLine(('pts_neck.deblocks.0', 'backbone_2d.deblocks.0'), 'first deblock of the decoder'),
            PresetLine(('bbox_head', 'dense_head'), 'the head runs in FP16'),
            PresetLine(
                ('view_transform.downsample', 'vtransform.downsample'),
                'the layers behind BEV pooling run in FP16',
                optional=True,
            ),
        ),
        'NVIDIA Lidar_AI_Solution, CUDA-BEVFusion, qat/ptq.py and qat/lean/quantize.py',
    ),
    'q3d-bevfusion': Preset(
        (
            PresetLine(('pts_backbone.blocks.0.0', 'backbone_2d.blocks.0.1'), 'first layer of the decoder'),
            PresetLine(('pts_backbone.blocks.0.3', 'backbone_2d.blocks.0.4'), 'second layer of the decoder'),
            PresetLine(('pts_neck.deblocks.0', 'backbone_2d.deblocks.0'), 'first deblock of the decoder'),
            PresetLine(('pts_neck.concat', 'backbone_2d.concat'), 'levels of the decoder'),
            PresetLine(
                ('view_transform.downsample.6', 'vtransform.downsample.6'),
                'last layer behind BEV pooling',
                optional=True,
            ),
        ),
        'q3d sensitivity mmdet3d/toy_bevfusion_w8a8.py mmdet3d/toy_bevfusion.pth --frames 2 '
        '--calibration-frames 16 --keep-output-error 0.015 --max-skipped 12 --candidates 6',
    ),
}
"""Name -> skip list."""


def _preset(entry: str) -> Preset:
    """The preset of a name with its prefix."""
    return PRESETS[entry[len(PREFIX) :]]


def expanded(skip: Sequence[str]) -> Iterator[Tuple[str, str]]:
    """The patterns of a skip list, those of its presets in the place of their names, each with its reason.

    Args:
        skip: Patterns and names of presets.

    Examples:
        >>> list(expanded(['neck', 'preset:nvidia-bevfusion']))[:2]
        [('neck', "skipped by 'neck'"), ('pts_middle_encoder.conv_input', \
"skipped by 'preset:nvidia-bevfusion' (first layer of the LiDAR branch)")]
    """
    for entry in skip:
        if entry.startswith(PREFIX):
            for line in _preset(entry).lines:
                for pattern in line.patterns:
                    yield pattern, f'skipped by {entry!r} ({line.reason})'
        else:
            yield entry, f'skipped by {entry!r}'


def missing(entry: str, names: Sequence[str]) -> Tuple[str, ...]:
    """The alternatives of the first line of a preset that means no layer; empty where each means some.

    Args:
        entry: Name of a preset, with its prefix.
        names: Names of all layers.
    """
    for line in _preset(entry).lines:
        if not line.optional and not any(matches(p, name) for p in line.patterns for name in names):
            return line.patterns
    return ()


def described(entry: str, names: Sequence[str]) -> str:
    """A preset written out: its patterns that mean layers of this model, with their reasons and its source.

    Args:
        entry: Name of a preset, with its prefix.
        names: Names of all layers.
    """
    preset = _preset(entry)
    lines = []
    for line in preset.lines:
        for pattern in line.patterns:
            count = sum(matches(pattern, name) for name in names)
            if count:
                lines.append(f'  {pattern}: {line.reason} ({count} layers and operations)')
    return '\n'.join([f'{entry} stands for ({preset.source}):', *lines])


def skips(example: str) -> Check:
    """Patterns of layer names and names of presets, as a tuple.

    Args:
        example: A pattern, for messages.
    """
    plain = patterns(example)

    def check(value: object, place: Place) -> Tuple[str, ...]:
        entries = plain(value, place)
        for i, entry in enumerate(entries):
            name = entry[len(PREFIX) :]
            if entry.startswith(PREFIX) and name not in PRESETS:
                hint = near_matches(name, list(PRESETS))
                known = ' or '.join(repr(PREFIX + known) for known in PRESETS)
                raise Q3DError.at(
                    place.item(i),
                    entry,
                    f'there is no such preset; {known} would work' + (hint if hint[:5] == '; did' else ''),
                )
        return entries

    return check
