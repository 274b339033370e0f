"""OpenPCDet's CPU mode is on for one file of tests at a time: it changes torch for the whole process."""

import pytest
import torch

CHANGED = {
    torch.Tensor: ('cuda',),
    torch.nn.Module: ('cuda',),
    torch.cuda: ('synchronize', 'empty_cache', 'FloatTensor', 'IntTensor', 'LongTensor'),
}


@pytest.fixture(scope='module', autouse=True)
def _torch_as_it_was():
    """Gives ``.cuda()`` and what else the CPU mode replaces back to the tests of other folders."""
    before = [(owner, name, getattr(owner, name)) for owner, names in CHANGED.items() for name in names]
    yield
    for owner, name, value in before:
        setattr(owner, name, value)
