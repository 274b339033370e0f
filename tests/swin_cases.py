"""Swin backbones for tests of both frameworks: weights, comparison by layer, what outliers cost."""

import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from q3d_plugin import checkpoints, lifecycle
from q3d_plugin.commands import spoil_checkpoint
from q3d_plugin.layers import QuantWeightLayer
from q3d_plugin.recipe import Recipe

SHARED = Path(os.environ.get('Q3D_SHARED', Path(__file__).resolve().parents[2] / 'shared'))
PICTURES = sorted((SHARED / 'data' / 'nuscenes_frame').glob('*CAM_FRONT_*.jpg'))

SMALL = dict(embed_dims=16, depths=(2, 2), num_heads=(2, 4), strides=(4, 2), out_indices=(0, 1))
TINY = dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), out_indices=(1, 2, 3))
"""Swin-T, as BEVFusion has it."""

VARIANTS = {
    'plain': {},
    'absolute positions': dict(use_abs_pos_embed=True, pretrain_img_size=(64, 96)),
    'no norm of patches': dict(patch_norm=False),
    'no bias of qkv': dict(qkv_bias=False, qk_scale=0.2),
    'frozen': dict(frozen_stages=1),
    'whole windows': dict(window_size=4),
}


class Swin(NamedTuple):
    """A framework's Swin.

    Attributes:
        build: Called with whether it is to be the Quant type, and settings as those of mmdet.
        levels: Called with a backbone and (N, 3, H, W) images; gives the list of its levels.
    """

    build: Callable
    levels: Callable


def trained_like_(model, seed=0):
    """Random weights with what training gives: scaling by fan-in, biases, norms that differ by channel.

    As the frameworks initialize them, branches add almost nothing to the residual stream and all norms are 1.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(like, scale):
        return torch.randn(like.shape, generator=draw) * scale

    with torch.no_grad():
        for module in model.modules():
            bias = getattr(module, 'bias', None)
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight.copy_(normal(module.weight, module.weight[0].numel() ** -0.5))
            elif isinstance(module, nn.LayerNorm):
                module.weight.copy_(normal(module.weight, 0.3).exp())
            if bias is not None:
                bias.copy_(normal(bias, 0.2))
            for name in ('relative_position_bias_table', 'absolute_pos_embed'):
                if hasattr(module, name):
                    getattr(module, name).copy_(normal(getattr(module, name), 0.5))
    return model


def image():
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def real_image():
    """One camera of the real nuScenes frame as BEVFusion reads it, (1, 3, 256, 704)."""
    from PIL import Image

    picture = np.asarray(Image.open(PICTURES[0]).resize((704, 396)))[140:]
    mean, std = (torch.tensor(v) for v in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    return ((torch.from_numpy(picture.copy()).float() - mean) / std).permute(2, 0, 1)[None]


def built(swin, quantized, settings):
    model = swin.build(quantized, **settings)
    model.eval()  # theirs returns None
    return model


def pair(swin, settings, recipe=None, seed=0, state=None):
    """A float backbone, and the quantized one with its weights, configured."""
    source = trained_like_(built(swin, False, settings), seed)
    if state is not None:
        source.load_state_dict(state)
    model = built(swin, True, settings)
    lifecycle.configure(model, Recipe.from_dict({'mode': 'float'} if recipe is None else recipe))
    checkpoints.check_state_dict(model, source.state_dict())
    result = model.load_state_dict(source.state_dict(), strict=False)
    assert not result.unexpected_keys and not [k for k in result.missing_keys if 'quantizer' not in k]
    return source, model


def calibrate(swin, model, x):
    lifecycle.calibrate(model, [x], lambda batch: swin.levels(model, batch))


def every_output(swin, model, x):
    """Name -> what each module returned, of those that return one tensor; and the levels."""
    seen, handles = {}, []
    for name, module in model.named_modules():

        def hook(module, args, out, name=name):
            if isinstance(out, torch.Tensor):
                seen[name] = out.clone()

        handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        seen.update({f'level.{i}': level for i, level in enumerate(swin.levels(model, x))})
    for handle in handles:
        handle.remove()
    return seen


def largest_difference(swin, model, source, x, per_layer=True):
    """Largest difference of any module's output, or of the levels alone, relative to its largest value."""
    expected, got = every_output(swin, source, x), every_output(swin, model, x)
    names = [name for name in expected if per_layer or name.startswith('level.')]
    assert set(expected) <= set(got) and len(names) >= (50 if per_layer else 2)
    return max(float((got[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in names)


def levels(swin, model, x):
    with torch.no_grad():
        return [level.clone() for level in swin.levels(model, x)]


def l1(swin, model, x, expected):
    """Mean relative L1 error of the levels."""
    got = levels(swin, model, x)
    return sum(float((a - b).abs().sum() / b.abs().sum()) for a, b in zip(got, expected)) / len(got)


def smoothed(swin, alpha, settings, x, **kwargs):
    """A float backbone, and the quantized one after calibration with SmoothQuant (None: without)."""
    source, model = pair(
        swin, settings, dict(smoothquant=None if alpha is None else dict(alpha=alpha)), **kwargs
    )
    calibrate(swin, model, x)
    return source, model


def recovered(swin, settings, x, seed, alpha):
    """The share of W8A8's loss on a backbone with outlier channels that SmoothQuant gives back.

    Five per cent of the channels between norms and linear layers, and of the values of each attention, are
    multiplied by 50 by the tool. The loss is the relative L1 error of the levels, all of it: also that which
    a backbone without outliers has.
    """
    source, model = pair(swin, settings, seed=seed)
    bench = types.SimpleNamespace(
        model=model,
        forward=lambda batch: {str(i): level for i, level in enumerate(swin.levels(model, batch))},
    )
    graph = spoil_checkpoint.watched_graph(bench, x)
    factors, names = spoil_checkpoint.choose_factors(graph, ['*'], 50, 0.05, seed)
    state = spoil_checkpoint.spoiled(bench, graph, factors, source.state_dict())
    assert spoil_checkpoint.difference(bench, state, x) < 1e-4
    # All but the patch embedding, which reads the image, and the second layer of each FFN.
    layers = [n for n, u in lifecycle.units(model) if isinstance(u, QuantWeightLayer)]
    assert set(layers) - set(names) == {n for n in layers if n.endswith(('projection', 'ffn.layers.1'))}
    expected, loss = levels(swin, source, x), {}
    for a in (None, alpha):
        _, model = smoothed(swin, a, settings, x, seed=seed, state=state)
        loss[a] = l1(swin, model, x, expected)
    return 1 - loss[alpha] / loss[None]


def original_names(state):
    """A checkpoint as the authors' repository names it; ``convert_weights`` of both frameworks reads that."""
    new = (
        ('stages.', 'layers.'),
        ('attn.w_msa.', 'attn.'),
        ('ffn.layers.0.0.', 'mlp.fc1.'),
        ('ffn.layers.1.', 'mlp.fc2.'),
        ('patch_embed.projection', 'patch_embed.proj'),
    )
    out = {}
    for name, value in state.items():
        for mine, theirs in new:
            name = name.replace(mine, theirs)
        out[name] = value
    return out


def check_frozen(source, model, any_frozen):
    """In training the same parameters are frozen as in the float backbone."""
    # Not in one line: MMDetection's Swin returns nothing from train().
    source.train(), model.train()
    frozen = [[n for n, p in m.named_parameters() if not p.requires_grad] for m in (source, model)]
    assert frozen[0] == frozen[1] and bool(frozen[0]) == any_frozen


def check_recomputed(swin):
    """Blocks that are recomputed in the backward pass have the same gradients, with every quantizer on."""
    gradients = []
    for with_cp in (False, True):
        settings = dict(SMALL, with_cp=with_cp, drop_path_rate=0.0)
        _, model = pair(swin, settings, dict(mode='qat', include=['*']))
        x = image()
        calibrate(swin, model, x)
        model.train()
        x.requires_grad_()
        sum(level.square().mean() for level in swin.levels(model, x)).backward()
        gradients.append({'image': x.grad, **{n: p.grad for n, p in model.named_parameters()}})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name
