"""A small dense network with everything that is quantized in one, and a sparse one."""

import torch
from torch import nn

from q3d_plugin import lifecycle
from q3d_plugin.layers import QuantAdd, QuantConcat
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import quantize_, share_input


class Net(nn.Module):
    """Convolutions with BatchNorm, an addition, a concatenation, branches that share their input, a linear
    layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Conv2d(8, 8, 2, stride=2)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.heat, self.box = nn.Conv2d(16, 3, 1), nn.Conv2d(16, 4, 1)
        self.score = nn.Linear(4, 2)

    def setup_quant(self):
        self.add, self.concat = QuantAdd(before_relu=False), QuantConcat()
        share_input([self.heat, self.box])

    def forward(self, x):
        x = self.stem(x)
        x = self.add(self.body(x), x)
        x = self.concat([x, self.up(self.down(x))])
        return self.heat(x), self.score(self.box(x).flatten(2).transpose(1, 2))


def made(device='cpu', **recipe):
    """A quantized net in eval mode on a device, without ranges; weights are the same every time.

    The recipe comes when the net is on its device, as it does in the analysis.
    """
    torch.manual_seed(0)
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model = quantize_(model).eval().to(device)
    lifecycle.configure(model, Recipe.from_dict({'target': 'simulation', **recipe}))
    return model


def frames(device='cpu', count=2, size=16):
    """Inputs that are the same every time."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, size, size, generator=generator).to(device) for _ in range(count)]


def calibrated(device='cpu', **recipe):
    """A net with ranges, calibrated on that device."""
    model = made(device, **recipe)
    lifecycle.calibrate(model, frames(device), model)
    return model


def moved(device, **recipe):
    """A net that was calibrated on the CPU, on a device: with the same ranges everywhere."""
    return calibrated(**recipe).to(device)


def sparse_frame(device='cpu', channels=4, size=8, count=80):
    """A sparse tensor of spconv with a batch of two."""
    import spconv.pytorch as spconv

    generator = torch.Generator().manual_seed(2)
    flat = torch.randperm(2 * size**3, generator=generator)[:count].sort().values
    axes = [flat // size**i % size for i in (2, 1, 0)]
    indices = torch.stack([flat // size**3, *axes], dim=1).int().to(device)
    features = torch.randn(count, channels, generator=generator).to(device)
    return spconv.SparseConvTensor(features, indices, [size] * 3, 2)


def sparse_net(device='cpu', algorithm=None):
    """A quantized sparse network, without ranges."""
    import spconv.pytorch as spconv

    torch.manual_seed(0)
    given = {} if algorithm is None else {'algo': algorithm}
    model = spconv.SparseSequential(
        spconv.SubMConv3d(4, 16, 3, bias=False, indice_key='a', **given),
        nn.ReLU(),
        spconv.SparseConv3d(16, 16, 3, stride=2, padding=1, bias=True, indice_key='b', **given),
        nn.ReLU(),
        spconv.SubMConv3d(16, 16, 3, bias=True, indice_key='c', **given),
        spconv.SparseInverseConv3d(16, 8, 3, indice_key='b', bias=False, **given),
    )
    for parameter in model.parameters():
        parameter.data.mul_(4)
    model = quantize_(model).eval().to(device)
    lifecycle.configure(model, Recipe.from_dict({'target': 'simulation'}))
    return model
