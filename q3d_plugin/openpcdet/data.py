"""The frames that calibration sees: the detector's own data set as it is tested, on the recipe's split."""

import copy
import logging
import random
from collections.abc import Mapping
from typing import Any, List, Tuple

import numpy as np
import torch
import torch.distributed as dist
from pcdet.datasets import build_dataloader
from torch.utils.data import DataLoader, Dataset

from q3d_plugin.errors import Q3DError
from q3d_plugin.recipe import CalibrationSpec

__all__ = ['calibration_cfg', 'calibration_loader', 'frame_name', 'rank_and_world']

# Keys of a data set's config that say, by mode, which frames there are; everything else is how frames are
# prepared, and stays that of the mode 'test'.
_FRAMES = ('DATA_SPLIT', 'INFO_PATH', 'SAMPLED_INTERVAL', 'ROI_BOXES_PATH')


def rank_and_world() -> Tuple[int, int]:
    """Rank of this process and number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def calibration_cfg(dataset_cfg, split: str):
    """Config of the data set: the frames of ``split``, prepared as for testing.

    OpenPCDet has two modes, ``train`` and ``test``, and ``DATA_SPLIT`` says which split each of them reads;
    a recipe may name either.

    Args:
        dataset_cfg: ``DATA_CONFIG``; not changed.
        split: ``'train'``, ``'val'`` or ``'test'``.

    Raises:
        Q3DError: The config has no such split.
    """
    splits = dataset_cfg.get('DATA_SPLIT') or {'train': 'train', 'test': 'test'}
    mode = next((m for m, s in splits.items() if s == split), split if split in splits else None)
    if mode is None:
        have = ', '.join(repr(s) for s in dict.fromkeys([*splits.values(), *splits]))
        raise Q3DError(
            f'MODEL.QUANT.CALIBRATION.SPLIT: {split!r} was given, but DATA_CONFIG.DATA_SPLIT has {have}'
        )
    out = copy.deepcopy(dataset_cfg)
    for key in _FRAMES:
        value = out.get(key)
        if isinstance(value, Mapping) and mode in value:
            value['test'] = copy.deepcopy(value[mode])
    return out


class _Frames(Dataset):
    """Some frames of a data set. Each draws the same random numbers whichever rank or worker reads it."""

    def __init__(self, dataset, indices: List[int], seed: int) -> None:
        self.dataset, self.indices, self.seed = dataset, indices, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int):
        index = self.indices[i]
        # OpenPCDet shuffles points in testing too, which decides what a full voxel keeps.
        np.random.seed((self.seed * 1000003 + index) % 2**32)
        random.seed(self.seed * 1000003 + index)
        return self.dataset[index]


def calibration_loader(dataset, spec: CalibrationSpec, logger: logging.Logger) -> Tuple[DataLoader, int]:
    """The loader of the calibration frames of this rank, one frame a batch.

    Args:
        dataset: The data set of the detector.
        spec: Split, number of frames, seed.
        logger: Where too few frames are reported.

    Returns:
        tuple: The loader, and the number of frames of all ranks.

    Raises:
        Q3DError: The split is not in the config, or has no frames.
    """
    cfg = calibration_cfg(dataset.dataset_cfg, spec.split)
    made, _, _ = build_dataloader(
        dataset_cfg=cfg,
        class_names=dataset.class_names,
        batch_size=1,
        dist=False,
        workers=0,
        logger=logger,
        training=False,
    )
    available = len(made)
    if available == 0:
        files = cfg.get('INFO_PATH', {}).get('test')
        raise Q3DError(
            f'MODEL.QUANT.CALIBRATION.SPLIT: {spec.split!r} has no frames (looked for {files} in '
            f'{getattr(made, "root_path", cfg.get("DATA_PATH"))})'
        )
    if spec.frames > available:
        logger.warning(
            f'MODEL.QUANT.CALIBRATION.FRAMES: {spec.frames} were asked for, the {spec.split} split has '
            f'{available}; all of them are used'
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(spec.seed))
    chosen = order[: spec.frames].tolist()
    rank, world = rank_and_world()
    # Workers of a spawned process start by importing the main script, so they are left out there.
    alone = world > 1 or not torch.cuda.is_available()
    loader = DataLoader(
        _Frames(made, chosen[rank::world], spec.seed),
        batch_size=1,
        num_workers=0 if alone else 4,
        collate_fn=made.collate_batch,
    )
    return loader, len(chosen)


def frame_name(batch: Any) -> str:
    """The frame of a batch, for messages."""
    names = batch.get('frame_id') if isinstance(batch, dict) else None
    return 'unknown' if names is None or len(names) == 0 else str(names[0])
