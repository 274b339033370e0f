"""Smoothing by two ranks against smoothing by one that sees all frames."""

import datetime
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from q3d_plugin import lifecycle
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import quantize_


def network(alpha):
    torch.manual_seed(5)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)]
    model = quantize_(nn.Sequential(*layers)).eval()
    lifecycle.configure(model, Recipe.from_dict(dict(target='simulation', smoothquant=dict(alpha=alpha))))
    return model


def batches():
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(2, 3, 8, 8, generator=generator) * (i + 1) for i in range(3)]


def smoothed(alpha, data):
    model = network(alpha)
    lifecycle.calibrate(model, data, model)
    return model.state_dict()


def on_a_rank(rank, folder):
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    store = f'file://{folder}/store'
    dist.init_process_group('gloo', init_method=store, rank=rank, world_size=3, timeout=limit)
    # The last rank has no frame at all.
    data = [batches()[0::2], batches()[1::2], []][rank]
    torch.save([smoothed(alpha, data) for alpha in (0.5, 'search')], os.path.join(folder, f'{rank}.pt'))
    dist.barrier()
    # Not destroy_process_group(): in torch 2.1 it can wait for a thread of its own forever, which wants the
    # interpreter to give a tensor back.
    os._exit(0)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason='needs gloo')
def test_ranks_smooth_as_one_that_saw_everything(tmp_path):
    mp.spawn(on_a_rank, (str(tmp_path),), nprocs=3)
    results = [torch.load(tmp_path / f'{rank}.pt') for rank in range(3)]
    alone, part = smoothed(0.5, batches()), smoothed(0.5, batches()[0:1])
    assert any(not torch.equal(part[k], v) for k, v in alone.items())
    for fixed, searched in results:
        for key, value in alone.items():
            assert torch.allclose(fixed[key], value, rtol=1e-6), key
        # Each rank has rows of its own; the choice is one.
        for key, value in results[0][1].items():
            assert torch.equal(searched[key], value), key
