"""The frames that calibration sees: the config's own data set, test pipeline and loader, on the recipe's
split."""

import copy
import logging
from typing import Any, Tuple

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from q3d_plugin.errors import Q3DError
from q3d_plugin.recipe import CalibrationSpec

__all__ = ['calibration_dataset', 'calibration_loader', 'frame_name']

# What tells a split from another; everything else (pipeline first of all) is that of the test set.
_SPLIT_KEYS = ('type', 'ann_file', 'data_root', 'data_prefix', 'metainfo', 'load_interval')


def calibration_dataset(cfg, split: str):
    """Config of the data set: the annotations of ``split`` with the test pipeline, as the deployed model
    sees data.

    Args:
        cfg: The config of the runner.
        split: ``'train'``, ``'val'`` or ``'test'``.

    Raises:
        Q3DError: The config has no loader for the split, or no test pipeline.
    """
    test = cfg.get('test_dataloader') or cfg.get('val_dataloader')
    source = cfg.get(f'{split}_dataloader')
    for name, loader in (('test_dataloader', test), (f'{split}_dataloader', source)):
        if loader is None:
            raise Q3DError(f'recipe.calibration.split: {split!r} was given, but the config has no {name}')
    dataset, source = copy.deepcopy(test['dataset']), source['dataset']
    while 'dataset' in source:  # CBGSDataset, RepeatDataset and the like
        source = source['dataset']
    if 'ann_file' not in source:
        raise Q3DError(
            f'recipe.calibration.split: {split!r} is a {source.get("type")}, which has no ann_file of its '
            'own; another split would work'
        )
    for key in _SPLIT_KEYS:
        if key in source:
            dataset[key] = copy.deepcopy(source[key])
    dataset['test_mode'] = True
    return dataset


def calibration_loader(cfg, spec: CalibrationSpec, logger: logging.Logger) -> Tuple[DataLoader, int]:
    """The loader of the calibration frames of this rank.

    Args:
        cfg: The config of the runner.
        spec: Split, number of frames, seed.
        logger: Where too few frames are reported.

    Returns:
        tuple: The loader, and the number of frames of all ranks.

    Raises:
        Q3DError: The split is empty.
    """
    loader = copy.deepcopy(cfg.get('test_dataloader') or cfg.get('val_dataloader'))
    loader['dataset'] = calibration_dataset(cfg, spec.split)
    loader['persistent_workers'] = False
    loader['drop_last'] = False
    loader.pop('batch_sampler', None)
    loader['sampler'] = dict(type='DefaultSampler', shuffle=False)
    whole = Runner.build_dataloader(loader)
    available = len(whole.dataset)
    if available == 0:
        raise Q3DError(f'recipe.calibration.split: {spec.split!r} has no frames')
    if spec.frames > available:
        logger.warning(
            f'recipe.calibration.frames: {spec.frames} were asked for, the {spec.split} split has '
            f'{available}; all of them are used'
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(spec.seed))
    chosen = order[: spec.frames].tolist()
    mine = chosen[get_rank() :: get_world_size()]
    subset = DataLoader(
        dataset=whole.dataset,
        sampler=mine,
        batch_size=whole.batch_size,
        num_workers=whole.num_workers,
        collate_fn=whole.collate_fn,
    )
    return subset, len(chosen)


def frame_name(batch: Any) -> str:
    """The file of the first frame of a batch, or its index, for messages."""
    samples = batch.get('data_samples') if isinstance(batch, dict) else None
    if not samples:
        return 'unknown'
    meta = samples[0].metainfo
    return str(meta.get('lidar_path') or meta.get('img_path') or meta.get('sample_idx', 'unknown'))
