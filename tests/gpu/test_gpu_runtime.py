"""Waits of the host, CUDA graphs, torch.compile and DistributedDataParallel."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from gpu_toys import frames, moved
from torch.profiler import ProfilerActivity, profile

from q3d_plugin.quantizer import Quantizer
from q3d_plugin.recipe import ActivationSpec, RangesSpec
from q3d_plugin.training.ranges import follow_weights, move_ranges, train_ranges

RECIPES = {
    'W8A8': {},
    'W4A8 dynamic': dict(weight=dict(bits=4), activation=dict(range='dynamic')),
    'smoothed dynamically': dict(smoothquant=dict(alpha=0.5, mode='dynamic')),
}
WAITS = ('aten::item', 'aten::_local_scalar_dense', 'aten::nonzero', 'cudaStreamSynchronize')


def waits_of(function):
    """How often a call reads a number back to the host, or waits for the device, by name of the operation."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        function()
    return {event.key: event.count for event in seen.key_averages() if event.key in WAITS}


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_quantized_forward_never_waits(device, recipe):
    model, batch = moved(device, **RECIPES[recipe]), frames(device)[0]
    with torch.no_grad():
        # The first pass reads the range of the concatenation, once.
        model(batch)
        assert waits_of(lambda: model(batch)) == {}


def test_a_wait_would_be_seen(device):
    x = torch.ones(3, device=device)
    assert waits_of(lambda: float(x.sum()))


@pytest.mark.parametrize('recipe', RECIPES)
def test_cuda_itself_finds_no_wait_in_a_forward_or_a_step(cuda, recipe):
    model, batch = moved(cuda, **RECIPES[recipe]), frames(cuda)[0]
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            model(batch)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode('error')
            try:
                outputs = model(batch)
                if gradients:
                    sum(o.sum() for o in outputs).backward()
            finally:
                torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize(
    'ranges',
    [
        RangesSpec('fixed', 'fixed'),
        RangesSpec('moving', 'moving'),
        RangesSpec('learned', 'learned', 'linear'),
        RangesSpec('learned', 'learned', 'log2'),
    ],
    ids=lambda spec: f'{spec.weight}-{spec.scale}',
)
def test_a_step_that_trains_ranges_never_waits(device, ranges):
    model, batch = moved(device), frames(device)[0]
    train_ranges(model, ranges)
    model.train()

    def step():
        follow_weights(model)
        move_ranges(model, 0.9)
        sum(o.square().mean() for o in model(batch)).backward()

    step()
    assert waits_of(step) == {}
    if device.type == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode('error')
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_graph_replays_what_the_model_computes(cuda, recipe):
    model, (first, second) = moved(cuda, **RECIPES[recipe]), frames(cuda)
    with torch.no_grad():
        expected = [o.clone() for o in model(second)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        still = first.clone()
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(still)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = model(still)
        still.copy_(second)
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs))


def test_a_graph_quantizes_an_input_that_was_quantized_before(cuda):
    quantizer = Quantizer(ActivationSpec(), name='shared').to(cuda)
    quantizer.set_range(torch.tensor(2.0))
    quantizer.owners = ['a', 'b']
    first, second = torch.randn(100, device=cuda), torch.randn(100, device=cuda)
    with torch.no_grad():
        expected = quantizer(second.clone())
        still = first.clone()
        quantizer(still)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = quantizer(still)
        still.copy_(second)
        graph.replay()
    assert torch.equal(outputs, expected)


def test_a_compiled_forward_computes_the_same(device):
    torch._dynamo.reset()
    model, batch = moved(device), frames(device)[0]
    with torch.no_grad():
        expected = model(batch)
        found = torch.compile(model, backend='aot_eager')(batch)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


def test_the_compiler_of_cuda_computes_nearly_the_same(cuda):
    torch._dynamo.reset()
    model, batch = moved(cuda), frames(cuda)[0]
    with torch.no_grad():
        expected = model(batch)
        found = torch.compile(model)(batch)
    for a, b in zip(expected, found):
        assert (a - b).abs().mean() < 2e-3 * a.abs().mean()


DISTRIBUTED = """
    import sys
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from gpu_toys import frames, moved

    backend, device = ('nccl', 'cuda:0') if sys.argv[1] == 'cuda' else ('gloo', 'cpu')
    dist.init_process_group(backend, init_method=sys.argv[2], rank=0, world_size=1)
    plain, model = moved(device), moved(device)
    wrapped = DistributedDataParallel(model, device_ids=[0] if backend == 'nccl' else None)
    batch = frames(device)[0]
    for m in (plain, wrapped):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            sum(o.square().mean() for o in m(batch)).backward()
            optimizer.step()
    for (name, a), b in zip(plain.state_dict().items(), model.state_dict().values()):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), name
    dist.destroy_process_group()
    print('the same')
"""


def test_one_rank_trains_as_no_rank(device, tmp_path):
    """In a process of its own: a process group stays with a process."""
    pytest.importorskip('torch.distributed')
    command = [
        sys.executable,
        '-c',
        textwrap.dedent(DISTRIBUTED),
        device.type,
        f'file://{tmp_path / "ranks"}',
    ]
    here = os.path.dirname(os.path.abspath(__file__))
    root = os.path.dirname(os.path.dirname(here))
    path = os.pathsep.join([root, here, os.environ.get('PYTHONPATH', '')])
    environment = {**os.environ, 'PYTHONPATH': path, 'GLOO_SOCKET_IFNAME': 'lo'}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip().endswith('the same'), done.stderr
