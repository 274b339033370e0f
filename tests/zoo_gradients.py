"""A training step of a quantized detector of a zoo: which parameters get a gradient, and is it finite."""

import contextlib
import copy

import torch

from q3d_plugin import lifecycle
from q3d_plugin.recipe import Recipe
from q3d_plugin.training import QuantTraining
from q3d_plugin.zoo import weights

RECIPE = {'mode': 'qat', 'include': ['*'], 'activation': {'calibrator': 'max'}}


def gradients(adapter, model, frame, half=False):
    """Name -> gradient after a step with the mean square of the head's raw outputs as the loss."""
    forward = adapter.forward_of(model)
    model.train()
    # In OpenPCDet these flags decide whether a loss is computed, which needs annotations.
    for module in (model, *adapter.heads_of(model)):
        module.training = False
    model.zero_grad(set_to_none=True)
    with torch.autocast('cpu', dtype=torch.bfloat16) if half else contextlib.nullcontext():
        outputs = [o for o in forward(copy.deepcopy(frame)).values() if o.requires_grad]
    sum(o.float().square().mean() for o in outputs).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def check_config(adapter, config, scale, half=False):
    """Asserts that everything that learns in float does so quantized, and every learned range, too."""
    torch.manual_seed(0)
    cfg = adapter.read(adapter.folder / config)
    reference = adapter.build(cfg)
    weights.randomize(reference)
    frame = adapter.synthetic_batch(cfg, reference)
    expected = gradients(adapter, reference, frame, half)
    recipe = Recipe.from_dict({**RECIPE, 'training': {'ranges': {'scale': scale}}})
    model = adapter.build(adapter.quantized_config(cfg, recipe.to_dict()))
    lifecycle.configure(model, recipe)
    adapter.load(model, copy.deepcopy(reference.state_dict()))
    lifecycle.calibrate(model, [frame], lambda batch: adapter.run(model, copy.deepcopy(batch)))
    training = QuantTraining(model, recipe)
    training.before_step(0.0)
    got = gradients(adapter, model, frame, half)
    finite = [name for name, gradient in got.items() if gradient is not None and gradient.isfinite().all()]
    learns = {name for name, gradient in expected.items() if gradient is not None}
    # Folded away: BatchNorm, whose shift is the bias of the layer before.
    lost = sorted(name for name in learns if name in got and name not in finite)
    assert not lost, lost
    ranges = {id(p) for p in training.parameters}
    named = {name for name, p in model.named_parameters() if id(p) in ranges}
    assert named and not sorted(named - set(finite)), sorted(named - set(finite))
    assert sum(got[name].abs().sum() > 0 for name in named) > 0.9 * len(named)
