"""Checkpoints are read without running what they name, with every version of torch."""

import collections
import pickle

import numpy as np
import pytest
import torch

from q3d_plugin import safe_load
from q3d_plugin.openpcdet.checkpoints import trust_openpcdet_checkpoints


class Stranger:
    """Nobody trusts it."""


@pytest.fixture(params=['this torch', 'torch 2.1'])
def version(request, monkeypatch):
    """This version of torch, and one that cannot be told what to trust."""
    if request.param == 'torch 2.1':
        monkeypatch.delattr(torch.serialization, 'add_safe_globals', raising=False)
    trust_openpcdet_checkpoints()


CONTENT = {
    'model_state': collections.OrderedDict(
        weight=torch.randn(3, 4).t(), half=torch.randn(2).half(), bytes=torch.arange(5, dtype=torch.uint8)
    ),
    'optimizer_state': {
        'parameter': torch.nn.Parameter(torch.randn(2)),
        'lr': np.float64(0.003),
        'betas': (np.float32(0.95), 0.99),
        'steps': np.arange(3),
    },
    'epoch': 3,
    'meta': {'type': torch.float16, 'shape': torch.Size([2, 3]), 'nothing': None, 'word': 'ä'},
}


@pytest.mark.parametrize('new', [True, False])
def test_what_a_training_checkpoint_holds_is_read(tmp_path, version, new):
    path = tmp_path / 'training.pth'
    torch.save(CONTENT, path, _use_new_zipfile_serialization=new)
    got = safe_load.load(str(path))
    assert got['epoch'] == 3 and got['meta'] == CONTENT['meta']
    assert isinstance(got['model_state'], collections.OrderedDict)
    for key, value in CONTENT['model_state'].items():
        assert got['model_state'][key].dtype == value.dtype and torch.equal(got['model_state'][key], value)
    state, given = got['optimizer_state'], CONTENT['optimizer_state']
    assert isinstance(state['parameter'], torch.nn.Parameter)
    assert torch.equal(state['parameter'], given['parameter'])
    assert state['lr'] == 0.003 and isinstance(state['lr'], np.float64)
    assert state['betas'] == given['betas'] and isinstance(state['betas'][0], np.float32)
    assert np.array_equal(state['steps'], given['steps'])


@pytest.mark.parametrize('new', [True, False])
def test_what_nobody_trusts_is_not_run(tmp_path, version, new):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / 'ran').touch, ()

    for number, thing in enumerate([Stranger(), Bomb(), eval]):
        path = tmp_path / f'{number}.pth'
        torch.save({'model_state': {}, 'more': thing}, path, _use_new_zipfile_serialization=new)
        with pytest.raises(pickle.UnpicklingError, match='(?i)unsupported|global'):
            safe_load.load(str(path))
    assert not (tmp_path / 'ran').exists()
