"""A value is remembered for those who read the same tensor, only while nothing changed."""

import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from q3d_plugin import lifecycle, memo
from q3d_plugin.memo import TensorMemo
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import quantize_, share_input


def test_only_the_same_tensor_in_the_same_state_finds_the_value():
    memo, x = TensorMemo(), torch.zeros(2)
    assert memo.value_of(x) is None
    memo.keep(x, 'value')
    assert memo.value_of(x) == 'value' and memo.value_of(x.clone()) is None
    x.add_(1)
    assert memo.value_of(x) is None


def test_a_value_without_gradients_is_not_handed_to_a_pass_with_them():
    memo, x = TensorMemo(), torch.zeros(2)
    with torch.no_grad():
        memo.keep(x, 'value')
        assert memo.value_of(x) == 'value'
    assert memo.value_of(x) is None


def test_it_keeps_nothing_alive_and_travels_empty():
    memo, x, value = TensorMemo(), torch.zeros(2), torch.ones(2)
    memo.keep(x, value)
    assert pickle.loads(pickle.dumps(memo)).value_of(x) is None
    dead = weakref.ref(value)
    del x, value
    gc.collect()
    assert dead() is None


class Block(nn.Module):
    """Two layers that read one tensor, each of them or both together in a region of checkpointing."""

    def __init__(self, regions):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.regions = regions
        quantize_(self)

    def setup_quant(self):
        share_input([self.first, self.second])

    def forward(self, x):
        def run(part, x):
            return checkpoint(part, x, use_reentrant=False)

        if self.regions == 'together':
            return run(lambda x: self.first(x).relu() + self.second(x), x)
        first = run(self.first, x) if self.regions in ('each', 'first') else self.first(x)
        return first.relu() + (run(self.second, x) if self.regions in ('each', 'second') else self.second(x))


@pytest.mark.parametrize('regions', ['together', 'each', 'first', 'second'])
def test_layers_that_share_a_quantizer_under_activation_checkpointing(regions):
    torch.manual_seed(0)
    model, reference = Block(regions), Block('none')
    reference.load_state_dict(model.state_dict())
    batch = torch.randn(2, 3, 5, 5)
    results = []
    for module in (model, reference):
        lifecycle.configure(module, Recipe.from_dict({'mode': 'qat'}))
        lifecycle.calibrate(module, [batch], module)
        x = batch.clone().requires_grad_()
        module.train()(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in module.parameters())])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results))


def test_nothing_is_handed_into_a_cuda_graph_or_out_of_it(monkeypatch):
    note, x = TensorMemo(), torch.ones(2)
    note.keep(x, 'outside')
    monkeypatch.setattr(memo, '_capturing', lambda _: True)
    assert note.value_of(x) is None
    note.keep(x, 'inside')
    assert note.value_of(x) == 'inside'
    monkeypatch.undo()
    assert note.value_of(x) is None
