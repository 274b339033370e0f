"""A framework whose configs are words, and a model with everything that the survey looks at."""

import time
from pathlib import Path

import torch
from torch import nn

from q3d_plugin import checkpoints
from q3d_plugin.adapter import Adapter
from q3d_plugin.transforms.insert import quantize_


class Net(nn.Module):
    """A convolution with BatchNorm, an attention, and a layer whose forward nothing calls."""

    def __init__(self, bypass=False):
        super().__init__()
        self.conv, self.bn = nn.Conv1d(4, 8, 1, bias=False), nn.BatchNorm1d(8)
        self.attention, self.idle, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 8), nn.Linear(8, 3)
        self.bypass = bypass

    def forward(self, x):
        x = self.bn(self.conv(x)).permute(2, 0, 1)
        x = self.attention(x, x, x)[0]
        return self.head(nn.functional.linear(x, self.idle.weight) if self.bypass else x)


class Words(Adapter):
    """An adapter without a framework; ``'unreadable'`` and ``'slow'`` are what they say."""

    name = 'words'
    folder = Path('/configs')

    def __init__(self, net=Net, quantize=quantize_, stop='', names=()):
        self.net, self.quantize, self.stop, self.names = net, quantize, stop, list(names)

    def configs(self):
        return self.names

    def read(self, path, options=None):
        if path.name == 'unreadable':
            raise ValueError('no such key\nsecond line')
        return {'name': path.name}

    def recipe_of(self, cfg, path):
        raise NotImplementedError

    def float_config(self, cfg):
        raise NotImplementedError

    def quantized_config(self, cfg, recipe):
        return {**cfg, 'quantized': True}

    def signature(self, cfg):
        return 'other' if cfg['name'] == 'c' else 'same'

    def build(self, cfg):
        torch.manual_seed(0)
        if cfg['name'] == 'slow':
            time.sleep(60)
        model = self.net()
        return (self.quantize(model) if cfg.get('quantized') else model).eval()

    def load(self, model, state):
        checkpoints.check_state_dict(model, state)
        model.load_state_dict(state)

    def prepare(self, model, batch):
        return batch

    def points_batch(self, model, points):
        raise NotImplementedError

    def reads_images(self, cfg):
        return False

    def camera_batch(self, cfg, model, frame):
        raise NotImplementedError

    def synthetic_batch(self, cfg, model):
        return torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))

    def voxels(self, batch):
        return None

    def training_batch(self, cfg, model, root):
        raise NotImplementedError

    def loss(self, model, batch):
        raise NotImplementedError

    def run(self, model, batch):
        out = model(batch)
        if self.stop:
            raise NotImplementedError(self.stop)
        return out
