"""Scales that an image backbone and the neck behind it have in common."""

import pytest
import torch
from torch import nn

from q3d_plugin import lifecycle
from q3d_plugin.fusion_parts import TopDownLevels, residual_readers
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import quantize_

STAGES = [f'net.layer{i}' for i in (1, 2, 3, 4)]


def readers(taken, count):
    """For each group: number of the stage that reads the level besides the neck, and the level."""
    return [
        (int(scale.units[0].split('.')[1][-1]), int(scale.units[-1].rpartition('.')[2]))
        for scale in residual_readers(STAGES, taken, 'neck', count)
    ]


@pytest.mark.parametrize(
    ('taken', 'count', 'expected'),
    [
        ([1, 2, 3], 2, [(3, 0), (4, 1)]),
        ([0, 1, 2, 3], 3, [(2, 0), (3, 1), (4, 2)]),
        ([0, 2], 1, [(2, 0)]),
        # Nothing but the neck reads the last stage.
        ([2, 3], 2, [(4, 0)]),
        ([3], 1, []),
    ],
)
def test_the_next_stage_reads_what_the_neck_takes(taken, count, expected):
    assert readers(taken, count) == expected


class Neck(TopDownLevels, nn.Module):
    def __init__(self, channels):
        super().__init__()
        made = [nn.Conv2d(c + (4 if i else 6), 4, 1) for i, c in enumerate(reversed(channels[:-1]))]
        self.lateral_convs = nn.ModuleList(reversed(made))
        self.fpn_convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in made)
        quantize_(self)


def test_a_level_is_joined_with_what_is_above_it():
    neck = Neck([3, 5, 6]).eval()
    lifecycle.configure(neck, Recipe.from_dict({'mode': 'float'}))
    levels = [torch.randn(1, c, 8 >> i, 8 >> i) for i, c in enumerate((3, 5, 6))]

    def join(i, low, high):
        high = nn.functional.interpolate(high, size=low.shape[2:], mode='nearest')
        return neck.fpn_convs[i](neck.lateral_convs[i](torch.cat([low, high], 1)))

    upper = join(1, levels[1], levels[2])
    for got, expected in zip(neck.fuse(levels, mode='nearest'), (join(0, levels[0], upper), upper)):
        torch.testing.assert_close(got, expected)
    lifecycle.configure(neck, Recipe.from_dict({}))
    for i in range(2):
        assert neck.concats[i].input_quantizer is neck.lateral_convs[i].input_quantizer
    assert neck.concats[0].input_quantizer is not neck.concats[1].input_quantizer
