"""A training with the order of OpenPCDet's tools/train.py and train_utils, on the contract double.

As a script: ``python train_double.py JSON``, where JSON is a list of what :func:`train` takes, one object for
each training; torchrun may run it. What :func:`result_of` gives is saved in each folder, as ``RANK_start.pt``
before the first step and as ``RANK.pt`` at the end.
"""

import json
import logging
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from easydict import EasyDict
from openpcdet_double import CLASSES, DATA, MODEL, double_as_pcdet
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

PARTS = ('BACKBONE_3D', 'BACKBONE_2D', 'DENSE_HEAD')


class OptimWrapper:
    """What of fastai's wrapper meets the plugin: it is no optimizer of torch but has one, and hands on to it
    what it has not itself; weight decay is its own, and goes through the groups two by two."""

    def __init__(self, opt, wd):
        self.opt, self.wd = opt, wd

    def __getattr__(self, name):
        return getattr(self.opt, name, None)

    @property
    def lr(self):
        return self.opt.param_groups[0]['lr']

    @lr.setter
    def lr(self, value):
        for group in self.opt.param_groups[:2]:
            group['lr'] = value

    def step(self):
        for lr, first, second in zip([self.lr], self.opt.param_groups[::2], self.opt.param_groups[1::2]):
            for parameter in (*first['params'], *second['params']):
                parameter.data.mul_(1 - self.wd * lr)
        self.opt.step()

    def zero_grad(self):
        self.opt.zero_grad()


def leaves(module):
    """The modules without children, whose parameters OpenPCDet gives to its one-cycle optimizer."""
    children = list(module.children())
    return [leaf for child in children for leaf in leaves(child)] if children else [module]


def build_optimizer(model, kind, lr=1e-3, decay=0.01):
    """As ``train_utils.optimization.build_optimizer``; no optimizer where ``kind`` is None."""
    if kind is None:
        return None
    if kind == 'sgd':
        return torch.optim.SGD(model.parameters(), lr=lr, weight_decay=decay, momentum=0.9)
    weights = list(nn.Sequential(*leaves(model)).parameters())
    groups = [{'params': weights, 'lr': 0}, {'params': [], 'lr': 0}]
    return OptimWrapper(torch.optim.Adam(groups, betas=(0.9, 0.99)), decay)


def training_state(model, optimizer, epoch, it):
    """As ``checkpoint_state``: there is no place for a recipe but the state of the model."""
    state = model.state_dict()
    state = type(state)((k, v.cpu()) for k, v in state.items())
    version = 'pcdet+0.6.0'
    return {
        'epoch': epoch,
        'it': it,
        'model_state': state,
        'optimizer_state': optimizer.state_dict(),
        'version': version,
    }


def build(data, quant, training=True, logger=None):
    """The quantized detector of the double, on its data set without shuffled voxels."""
    from pcdet.datasets import build_dataloader
    from pcdet.models import build_network

    cfg = EasyDict(MODEL, NAME='QuantCenterPoint', QUANT=quant)
    for section in PARTS:
        cfg[section].NAME = f'Quant{cfg[section].NAME}'
    data_cfg = EasyDict(DATA, DATA_PATH=str(data), SHUFFLE=False)
    dataset, _, _ = build_dataloader(data_cfg, CLASSES, 1, False, logger=logger, training=training)
    return build_network(cfg, len(CLASSES), dataset), dataset


def train(
    folder,
    data,
    quant,
    start=None,
    epochs=1,
    batch_size=1,
    optimizer='adam_onecycle',
    kill=None,
    steps=None,
    lr=1e-3,
):
    """Trains, from the newest checkpoint in ``folder`` that loads or else from ``start``.

    Args:
        folder: Of the run; checkpoints are saved there after each epoch.
        data: Folder of the data set.
        quant: ``MODEL.QUANT``.
        start: ``--pretrained_model``.
        epochs: Of the whole training.
        batch_size: Of one process.
        optimizer: ``'sgd'``, ``'adam_onecycle'``, or None where no step is made.
        kill: Number of the iteration after which the process is killed.
        steps: Number of the iteration after which the next forward pass is the last thing.
        lr: The highest learning rate.

    Returns:
        tuple: Model and optimizer.
    """
    from pcdet.models import model_fn_decorator

    many = dist.is_initialized()
    rank = dist.get_rank() if many else 0
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger(f'train-{folder}-{rank}')
    logger.setLevel(logging.INFO)
    logger.handlers = [logging.FileHandler(folder / f'{rank}.log')]
    model, dataset = build(data, quant, logger=logger)
    sampler = DistributedSampler(dataset, shuffle=False) if many else None
    loader = DataLoader(dataset, batch_size, sampler=sampler, collate_fn=dataset.collate_batch)
    optimizer = build_optimizer(model, optimizer, lr)
    it, first = 0, 0
    if start is not None:
        model.load_params_from_file(filename=str(start), logger=logger, to_cpu=many)
    for path in sorted(folder.glob('checkpoint_*.pth'), key=os.path.getmtime, reverse=True):
        try:
            it, first = model.load_params_with_optimizer(
                str(path), to_cpu=many, optimizer=optimizer, logger=logger
            )
            break
        except Exception:
            continue
    model.train()
    torch.save(result_of(model), folder / f'{rank}_start.pt')
    wrapped = nn.parallel.DistributedDataParallel(model) if many else model
    step = model_fn_decorator()
    for epoch in range(first, epochs):
        for batch in loader:
            if isinstance(optimizer, OptimWrapper):
                optimizer.lr = lr * (1 - it / (epochs * len(loader)))
            wrapped.train()
            optimizer.zero_grad()
            if it == steps:
                step(wrapped, batch)
                return model, optimizer
            step(wrapped, batch).loss.backward()
            nn.utils.clip_grad_norm_(wrapped.parameters(), 10)
            optimizer.step()
            it += 1
            if it == kill:
                os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0:
            path = folder / f'checkpoint_epoch_{epoch + 1}.pth'
            torch.save(
                training_state(model, optimizer, epoch + 1, it), path, _use_new_zipfile_serialization=False
            )
    return model, optimizer


def result_of(model):
    """The state of a model as numbers to compare: weights, ranges and modes."""
    return {k: v.detach().clone() for k, v in model.state_dict().items() if k != 'q3d_recipe'}


def main(runs):
    """Trains once for each entry of ``runs``, in this process or as a rank of torchrun."""
    from q3d_plugin.cpu import enable_cpu_mode

    enable_cpu_mode()
    if 'WORLD_SIZE' in os.environ:
        dist.init_process_group('gloo')
    rank = dist.get_rank() if dist.is_initialized() else 0
    with double_as_pcdet():
        from q3d_plugin.openpcdet.parts import register_parts

        register_parts()
        for run in runs:
            model, _ = train(**run)
            torch.save(result_of(model), f'{run["folder"]}/{rank}.pt')
    if dist.is_initialized():
        dist.barrier()
    # Not destroy_process_group(): in torch 2.1 it can wait for a thread of its own forever, which wants the
    # interpreter to give a tensor back.
    os._exit(0)


if __name__ == '__main__':
    main(json.loads(sys.argv[1]))
