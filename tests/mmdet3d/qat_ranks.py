"""A training of the toy detector as one of several processes; run by torch.distributed.run.

The loss is a mean over samples, so that one process and two have the same gradients of the same batch. (Those
of CenterHead are divided by the number of objects in the batch of each process.)
"""

import json
import os
import sys
import time

import torch
import torch.distributed as dist
from mmdet3d.registry import MODELS
from mmdet3d.utils import register_all_modules
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

import q3d_plugin.mmdet3d  # noqa: F401  (registers the plugin)
from q3d_plugin import lifecycle
from q3d_plugin.cpu import enable_cpu_mode

enable_cpu_mode()
register_all_modules()
config, out, changes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])


@MODELS.register_module()
class MeanLossHead(MODELS.get('QuantCenterHead')):
    """CenterHead with the mean square of its outputs as the loss."""

    def loss_by_feat(self, preds_dicts, batch_gt_instances_3d, *args, **kwargs):
        tensors = [t for task in preds_dicts for t in task[0].values()]
        return {f'loss_{i}': t.square().mean() for i, t in enumerate(tensors)}


@HOOKS.register_module()
class Tester(Hook):
    """Stops where it is told to, and keeps the ranges that calibration chose."""

    def __init__(self, dies=''):
        self.dies = dies

    def before_train(self, runner):
        model = getattr(runner.model, 'module', runner.model)
        self.ranges = [q.amax.clone() for q in lifecycle.quantizers(model)]


if changes.pop('dies', None) and os.environ['RANK'] == '1':
    import q3d_plugin.mmdet3d.hook as hook

    hook.lifecycle.calibrate = lambda *args, **kwargs: os._exit(3)

cfg = Config.fromfile(config)
cfg.merge_from_dict(changes)
cfg.custom_hooks.append(dict(type='Tester', priority='LOW'))
runner = Runner.from_cfg(cfg)
start = time.time()
runner.train()
model = getattr(runner.model, 'module', runner.model)
found = {
    'ranges': next(h for h in runner.hooks if isinstance(h, Tester)).ranges,
    'parameters': {n: p.detach() for n, p in model.named_parameters()},
    'amax': [q.amax for q in lifecycle.quantizers(model)],
}
torch.save(found, os.path.join(out, f'{os.environ["RANK"]}.pt'))
dist.barrier()
# Not destroy_process_group(): in torch 2.1 it can wait for a thread of its own forever.
os._exit(0)
