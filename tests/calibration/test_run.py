"""The pass over the data: who sees what, what stops it, and several ranks against one."""

import datetime
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from q3d_plugin.calibration import InputStatistics, collect, compute_ranges
from q3d_plugin.errors import Q3DError
from q3d_plugin.lifecycle import configure, quantizers, set_enabled
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import quantize_


def network():
    """Two layers with a ReLU between them; the same weights for every caller."""
    torch.manual_seed(5)
    model = quantize_(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)))
    configure(model, Recipe())
    return model


def activations(model):
    return [q for q in quantizers(model) if not q.per_channel]


def without_weights(model):
    for quantizer in quantizers(model):
        if quantizer.per_channel:
            quantizer.disable()
    return model


def batches(count=4):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(20, 6, generator=generator) * (i + 1) for i in range(count)]


def test_every_activation_is_observed_in_eval_mode_without_gradients():
    model = without_weights(network()).train()
    seen = []

    def forward(batch):
        assert not model.training and not torch.is_grad_enabled()
        seen.append(batch)
        return model(batch)

    data = batches()
    assert collect(model, iter(data), forward, activations(model)) == 4
    assert all(a is b for a, b in zip(seen, data)) and len(seen) == 4
    assert model.training
    first, second = (q.observer for q in activations(model))
    assert first.frames == second.frames == 4
    compute_ranges(activations(model))
    for quantizer in quantizers(model):
        quantizer.disable()
    with torch.no_grad():
        hidden = torch.cat([model[1](model[0](x)) for x in data])
    assert first.maximum == max(float(x.max()) for x in data)
    assert first.minimum == min(float(x.min()) for x in data)
    assert second.maximum == pytest.approx(float(hidden.max()), rel=1e-6)
    assert second.minimum == 0


@pytest.mark.parametrize('training', [True, False])
def test_the_training_mode_is_restored_after_an_error_too(training):
    model = network().train(training)

    def forward(batch):
        raise KeyError('from the model')

    with pytest.raises(KeyError, match='from the model'):
        collect(model, batches(), forward, activations(model))
    assert model.training is training and model[2].training is training


def test_statistics_begin_anew():
    model = without_weights(network())
    collect(model, [torch.full((2, 6), 100.0)], model, activations(model))
    collect(model, [torch.full((2, 6), 1.0)], model, activations(model))
    assert activations(model)[0].observer.amax == 1


def test_nothing_to_see_is_no_batch():
    model = network()
    assert collect(model, [], model, activations(model)) == 0


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('names, said', [(None, 'number 2'), (lambda b: f'scene_{len(b)}', 'scene_22')])
def test_nan_stops_at_once_and_layer_and_frame_are_named(value, names, said):
    model = without_weights(network())
    data = batches()
    data[2] = torch.full((22, 6), value)
    seen = []

    def forward(batch):
        seen.append(batch)
        model(batch)

    with pytest.raises(Q3DError) as caught:
        collect(model, data, forward, activations(model), names)
    message = str(caught.value)
    assert "NaN or Inf in the input of '0'" in message and f'frame {said}' in message
    assert len(seen) == 3


def test_the_first_layer_of_the_model_with_nan_is_named():
    model = without_weights(network())
    with torch.no_grad():
        model[0].weight[3, 2] = float('inf')
    with pytest.raises(Q3DError, match=r"in the input of '3' in frame number 0"):
        collect(model, batches(), model, activations(model))
    data = batches()
    data[1][0, 0] = float('nan')
    model = without_weights(network())
    with pytest.raises(Q3DError, match=r"in the input of '0' \(and of 1 layers more\) in frame number 1"):
        collect(model, data, model, activations(model))


def ranges(model, data):
    collect(model, data, model, activations(model))
    compute_ranges(activations(model))
    return {k: v for k, v in model.state_dict().items() if k.endswith(('_amax', '_state'))}


def on_a_rank(rank, folder):
    """Both scenarios on one of two ranks; what happened is written into ``folder``."""
    torch.set_num_threads(1)
    # A rank that waits for another one in vain is an error, not a test that never ends.
    limit = datetime.timedelta(seconds=60)
    store = f'file://{folder}/store'
    dist.init_process_group('gloo', init_method=store, rank=rank, world_size=2, timeout=limit)
    # Rank 1 has fewer frames, as the last shard of a data set has.
    data = batches(5)[rank::2]
    result = dict(ranges=ranges(without_weights(network()), data))
    if rank == 1:
        data[1][0, 0] = float('nan')
    model = without_weights(network()).train()
    try:
        collect(model, data, model, activations(model))
    except Q3DError as error:
        result['error'], result['training'] = str(error), model.training
    torch.save(result, os.path.join(folder, f'{rank}.pt'))
    dist.barrier()
    # Not destroy_process_group(): in torch 2.1 it can wait for a thread of its own forever, which wants the
    # interpreter to give a tensor back.
    os._exit(0)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason='needs gloo')
def test_two_ranks_have_the_ranges_of_one_that_saw_everything_and_stop_together(tmp_path):
    mp.spawn(on_a_rank, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
    expected = ranges(without_weights(network()), batches(5))
    halves = [ranges(without_weights(network()), batches(5)[rank::2]) for rank in range(2)]
    assert any(not torch.equal(halves[0][k], halves[1][k]) for k in expected)
    for result in results:
        assert result['ranges'].keys() == expected.keys() and len(expected) == 8
        for key, value in expected.items():
            assert torch.equal(result['ranges'][key], value)
        assert "NaN or Inf in the input of '0'" in result['error'] and 'number 1' in result['error']
        assert result['training']


def test_input_statistics_notice_that_a_tensor_was_changed_in_place():
    model = quantize_(nn.ModuleDict({name: nn.Conv2d(2, 3, 1) for name in 'ab'}))
    set_enabled(model, False)
    statistics = InputStatistics(dict(model.items()))
    x = torch.ones(1, 2, 3, 3)
    with statistics.attached(), torch.no_grad():
        model['a'](x)
        model['b'](x.mul_(5))
    assert statistics.amax['a'].tolist() == [1, 1] and statistics.amax['b'].tolist() == [5, 5]
