"""Layers that are float by default, and skip lists by name."""

import logging

import pytest
from torch import nn

from q3d_plugin import lifecycle
from q3d_plugin.coverage import coverage
from q3d_plugin.errors import Q3DError
from q3d_plugin.layers.model import units
from q3d_plugin.recipe import Recipe
from q3d_plugin.recipe.presets import PREFIX, PRESETS, expanded, missing
from q3d_plugin.transforms.insert import quantize_

NVIDIA = 'preset:nvidia-bevfusion'


class Fusion(nn.Module):
    """The names of BEVFusion in one framework or the other."""

    NAMES = {
        'mmdet3d': ('pts_middle_encoder', 'view_transform', 'pts_neck', 'bbox_head'),
        'openpcdet': ('backbone_3d', 'vtransform', 'backbone_2d', 'dense_head'),
    }

    def __init__(self, framework, cameras=True):
        super().__init__()
        lidar, view, neck, head = self.NAMES[framework]
        conv = lambda: nn.Conv2d(4, 4, 1)  # noqa: E731
        self.add_module(lidar, nn.ModuleDict(dict(conv_input=nn.Sequential(conv()), conv_out=conv())))
        if cameras:
            down = nn.Sequential(conv(), nn.ReLU(), nn.ReLU(), conv(), nn.ReLU(), nn.ReLU(), conv())
            self.add_module(view, nn.ModuleDict(dict(downsample=down, depthnet=conv())))
        self.add_module(neck, nn.ModuleDict(dict(deblocks=nn.ModuleList([conv(), conv()]), concat=conv())))
        # OpenPCDet pads before the first layer of a block, in the module that also has the deblocks.
        block = [conv(), nn.ReLU(), nn.ReLU(), conv()]
        if framework == 'mmdet3d':
            self.pts_backbone = nn.ModuleDict(dict(blocks=nn.ModuleList([nn.Sequential(*block)])))
        else:
            padded = nn.Sequential(nn.ZeroPad2d(1), *block)
            self.get_submodule(neck)['blocks'] = nn.ModuleList([padded])
        self.add_module(
            head, nn.ModuleDict(dict(heatmap_head=nn.Sequential(conv(), conv()), shared_conv=conv()))
        )

    def setup_quant(self):
        for name, unit in units(self):
            if '_head.' in name:
                unit.float_by_default = 'heads are fragile'


def fusion(framework, cameras=True, logger=None, **recipe):
    model = quantize_(Fusion(framework, cameras))
    lifecycle.configure(model, Recipe.from_dict(recipe), logger)
    return model


def floats(model):
    return {name for name, unit in units(model) if not unit.quantizers()}


@pytest.mark.parametrize('framework', Fusion.NAMES)
def test_the_preset_means_the_same_in_both_frameworks(framework):
    lidar, view, neck, head = Fusion.NAMES[framework]
    model = fusion(framework, skip=[NVIDIA])
    assert floats(model) == {
        f'{lidar}.conv_input.0',
        f'{view}.downsample.0',
        f'{view}.downsample.3',
        f'{view}.downsample.6',
        f'{neck}.deblocks.0',
        f'{head}.heatmap_head.0',
        f'{head}.heatmap_head.1',
        f'{head}.shared_conv',
    }
    note = {row.name: row.note for row in coverage(model)}
    assert note[f'{neck}.deblocks.0'] == f"skipped by '{NVIDIA}' (first deblock of the decoder)"
    # Beside patterns, and without the cameras, which have no layers behind BEV pooling.
    assert f'{lidar}.conv_out' in floats(fusion(framework, cameras=False, skip=[NVIDIA, '*conv_out']))


@pytest.mark.parametrize('framework', Fusion.NAMES)
def test_the_preset_of_our_own_sensitivity_means_the_same_in_both_frameworks(framework):
    _, view, neck, head = Fusion.NAMES[framework]
    model = fusion(framework, skip=['preset:q3d-bevfusion'], include=[head])
    first = ('pts_backbone.blocks.0.0', 'pts_backbone.blocks.0.3')
    blocks = first if framework == 'mmdet3d' else (f'{neck}.blocks.0.1', f'{neck}.blocks.0.4')
    assert floats(model) == {*blocks, f'{neck}.deblocks.0', f'{neck}.concat', f'{view}.downsample.6'}


def test_the_log_shows_a_preset_written_out(caplog):
    logger = logging.getLogger('presets')
    with caplog.at_level(logging.INFO):
        fusion('mmdet3d', logger=logger, skip=[NVIDIA])
    (text,) = [r.getMessage() for r in caplog.records if r.name == 'presets']
    assert text.startswith(f'{NVIDIA} stands for (NVIDIA')
    for word in ('pts_neck.deblocks.0: first deblock', 'view_transform.downsample', '(3 layers'):
        assert word in text
    assert 'backbone_2d' not in text  # names of the other framework


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(Q3DError) as caught:
        Recipe.from_dict(dict(skip=['a', 'preset:nvidia-bevfuson']))
    message = str(caught.value)
    assert message.startswith("recipe.skip[1]: 'preset:nvidia-bevfuson' was given; there is no such preset")
    assert repr(NVIDIA) in message and "did you mean 'nvidia-bevfusion'" in message


def test_a_preset_of_another_detector_is_refused():
    model = quantize_(nn.ModuleDict(dict(backbone=nn.Conv2d(4, 4, 1))))
    with pytest.raises(
        Q3DError, match=r'skip\[0\]: .*no layer here is pts_middle_encoder.conv_input or back'
    ):
        lifecycle.configure(model, Recipe.from_dict(dict(skip=[NVIDIA])))


def test_every_preset_says_why_and_from_where():
    for name, preset in PRESETS.items():
        assert preset.source and preset.lines
        assert all(line.patterns and line.reason for line in preset.lines)
        assert missing(PREFIX + name, []) == preset.lines[0].patterns
        assert len(list(expanded([PREFIX + name]))) == sum(len(line.patterns) for line in preset.lines)


def test_a_layer_is_float_by_default_until_it_is_included():
    model = fusion('mmdet3d')
    head = {'bbox_head.heatmap_head.0', 'bbox_head.heatmap_head.1', 'bbox_head.shared_conv'}
    assert floats(model) == head
    notes = {row.note for row in coverage(model) if row.name in head}
    assert notes == {'float by default: heads are fragile'}
    some = fusion('mmdet3d', include=['*heatmap_head'])
    assert floats(some) == {'bbox_head.shared_conv'}
    # What is skipped stays float, whatever includes it, and settings follow the overrides.
    recipe = dict(
        include='*', skip=['*.heatmap_head.1'], overrides=[dict(layers='bbox_head', activation=None)]
    )
    mixed = fusion('mmdet3d', **recipe)
    assert floats(mixed) == {'bbox_head.heatmap_head.1'}
    assert mixed.bbox_head['shared_conv'].input_quantizer is None
    assert mixed.bbox_head['shared_conv'].weight_quantizer is not None


def test_what_cannot_be_included_is_refused():
    with pytest.raises(Q3DError, match=r"include\[0\]: '\*head_heatmap' matches none"):
        fusion('mmdet3d', include=['*head_heatmap'])
    with pytest.raises(
        Q3DError, match=r"include\[0\]: 'pts_neck' was given; .*quantized without it.*known: 'bbox"
    ):
        fusion('mmdet3d', include=['pts_neck'])


def test_a_pattern_of_smoothquant_that_means_float_layers_is_refused():
    with pytest.raises(Q3DError, match='float by default: heads are fragile'):
        fusion('mmdet3d', smoothquant=dict(layers=['bbox_head']))
    fusion('mmdet3d', include='bbox_head', smoothquant=dict(layers=['bbox_head']))
