"""A small detector of dense layers, and a bench around it: what the analysis needs of a framework."""

import logging
from pathlib import Path

import torch
from torch import nn

from q3d_plugin import lifecycle
from q3d_plugin.analysis.measures import OutputError
from q3d_plugin.analysis.sensitivity import float_outputs
from q3d_plugin.analysis.switch import Switch
from q3d_plugin.bench import Bench, Frames, raw_outputs
from q3d_plugin.layers import QuantAdd, QuantConcat
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import quantize_, share_input


class Block(nn.Module):
    """A residual block whose activations are rectified in place, as in the detectors."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def setup_quant(self):
        self.add = QuantAdd()

    def forward(self, x):
        return self.relu(self.add(self.conv2(self.relu(self.conv1(x))), x))


class Head(nn.Module):
    """Two branches; what they give is decoded by a method of the usual name."""

    def __init__(self, channels):
        super().__init__()
        for name, out in (('heat', 3), ('box', 4)):
            layers = [
                nn.Conv2d(channels, 8, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(8, out, 3, padding=1),
            ]
            setattr(self, name, nn.Sequential(*layers))

    def setup_quant(self):
        share_input([self.heat[0], self.box[0]])

    def forward(self, x):
        return {'heat': self.heat(x), 'box': self.box(x)}

    def predict_by_feat(self, outputs):
        raise AssertionError('the raw outputs are wanted, not the boxes')


class Toy(nn.Module):
    """Stem, residual block, two levels that are concatenated, head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.block = Block(8)
        self.down = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.ReLU(inplace=True))
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = Head(16)

    def setup_quant(self):
        self.concat = QuantConcat()

    def forward(self, x):
        x = self.block(self.stem(x))
        y = self.up(self.down(x))
        return self.head.predict_by_feat(self.head(self.concat([x, y])))


class DictToy(nn.Module):
    """The same parts handing one dictionary on, as OpenPCDet's do."""

    def __init__(self):
        super().__init__()
        inner = Toy()

        class Backbone(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, self.block = inner.stem, inner.block

            def forward(self, data):
                data['features'] = self.block(self.stem(data.pop('points')))
                data['levels'] = {'x1': data['features']}
                return data

        class Dense(nn.Module):
            def __init__(self):
                super().__init__()
                self.down, self.up = inner.down, inner.up

            def setup_quant(self):
                self.concat = QuantConcat()

            def forward(self, data):
                x = data['levels']['x1']
                data['features'] = self.concat([x, self.up(self.down(x))])
                return data

        class DictHead(Head):
            def forward(self, data):
                self.predict_by_feat(Head.forward(self, data['features']))

        self.backbone, self.dense, self.head = Backbone(), Dense(), DictHead(16)

    def forward(self, x):
        data = {'points': x, 'batch_size': torch.tensor(len(x)), 'names': ['a']}
        for part in (self.backbone, self.dense, self.head):
            data = part(data)


def quantized(model_class=Toy, seed=0):
    """A quantized toy in eval mode, without ranges."""
    torch.manual_seed(seed)
    model = model_class().eval()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    blocks = {Block: type('QuantBlock', (Block,), {})}
    if model_class is DictToy:
        blocks.update({type(m): type('Quant', (type(m),), {}) for m in (model.dense, model.head)})
    else:
        blocks[Head] = type('QuantHead', (Head,), {})
    return quantize_(model, blocks)


def toy_recipe(**given):
    """A recipe of a few frames that may have any widths."""
    return Recipe.from_dict({'target': 'simulation', 'calibration': {'frames': 3}, **given})


class ToyBench(Bench):
    """A bench without a framework; its metric falls with the error of the outputs."""

    framework = 'toy'
    second_stage = False

    def __init__(self, config='toy.py', checkpoint='toy.pth', options=None, recipe=None, model_class=Toy):
        self.config, self.checkpoint = Path(config), Path(checkpoint)
        self.model, self.classes = quantized(model_class), ('heat', 'box')
        self.logger, self.quantized = logging.getLogger('toy'), False
        self.recipe, self.evaluated = recipe or toy_recipe(), 0
        lifecycle.configure(self.model, self.recipe)
        self.keep_float_state()

    def frames_of_split(self, split, count, seed=0):
        generator = torch.Generator().manual_seed(seed + (split == 'val'))
        return Frames([torch.randn(1, 3, 16, 16, generator=generator).abs_() for _ in range(count)])

    @torch.no_grad()
    def run(self, batch):
        return self.model(batch)

    def forward(self, batch):
        return raw_outputs([self.model.head], ('predict_by_feat',), lambda: self.run(batch))

    def evaluate(self, folder=None):
        self.evaluated += 1
        total = sum(float(t.abs().mean()) for b in self.frames('val', 2) for t in self.forward(b).values())
        return {'mAP': total, 'NDS': total / 2, 'AP': {'heat': total}, 'all': {}}

    def settings(self):
        return {'model': 'toy'}


def calibrated_bench(**given):
    """A toy with weights of four bits, calibrated; ``given`` are changes of its recipe."""
    bench = ToyBench(recipe=toy_recipe(**{'weight': {'bits': 4}, **given}))
    bench.prepare(bench.recipe)
    return bench


def by_hand(bench, names, batches):
    """Error of the outputs of a fresh model of which only ``names`` have quantizers.

    The ranges are those of the whole recipe: what shares a scale with a layer has a part in its range.
    """
    other = ToyBench(recipe=bench.recipe)
    other.prepare(other.recipe)
    for name, unit in lifecycle.units(other.model):
        if name not in names:
            unit.input_quantizer = None
            if hasattr(unit, 'weight_quantizer'):
                unit.weight_quantizer = None
    error = OutputError()
    references = float_outputs(Switch(bench.model), bench.forward, batches)
    for reference, batch in zip(references, batches):
        error.add(reference, other.forward(batch))
    return error.relative_l1
