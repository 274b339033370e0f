"""A data set whose info files name frames, which are made up from their names."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import torch
from easydict import EasyDict
from torch.utils.data import DataLoader, Dataset


class DatasetTemplate(Dataset):
    def __init__(self, dataset_cfg=None, class_names=None, training=True, root_path=None, logger=None):
        self.dataset_cfg, self.class_names = dataset_cfg, class_names
        self.training, self.logger = training, logger
        self.root_path = Path(root_path or dataset_cfg.DATA_PATH)
        self.point_cloud_range = np.array(dataset_cfg.POINT_CLOUD_RANGE, dtype=np.float32)
        self.point_feature_encoder = EasyDict(num_point_features=5)
        self.voxel_size = dataset_cfg.VOXEL_SIZE
        size = self.point_cloud_range[3:6] - self.point_cloud_range[:3]
        self.grid_size = np.round(size / np.array(self.voxel_size)).astype(np.int64)
        self.depth_downsample_factor = None

    @property
    def mode(self):
        return 'train' if self.training else 'test'

    @staticmethod
    def collate_batch(batch_list, _unused=False):
        out = {'batch_size': len(batch_list)}
        for key in batch_list[0]:
            values = [frame[key] for frame in batch_list]
            if key == 'voxel_coords':
                values = [np.pad(v, ((0, 0), (1, 0)), constant_values=i) for i, v in enumerate(values)]
            stacked = key in ('frame_id', 'gt_boxes', 'camera_imgs')
            out[key] = np.stack(values) if stacked else np.concatenate(values)
        return out


class NuScenesDataset(DatasetTemplate):
    def __init__(self, dataset_cfg, class_names, training=True, root_path=None, logger=None):
        root_path = (root_path or Path(dataset_cfg.DATA_PATH)) / dataset_cfg.VERSION
        super().__init__(dataset_cfg, class_names, training, root_path, logger)
        self.infos = []
        for name in dataset_cfg.INFO_PATH[self.mode]:
            if (self.root_path / name).exists():
                self.infos += json.loads((self.root_path / name).read_text())

    def __len__(self):
        return len(self.infos)

    def __getitem__(self, index):
        info = self.infos[index]
        grid = self.grid_size
        generator = np.random.default_rng(info['seed'])
        cells = generator.choice(int(np.prod(grid)), info.get('voxels', 60), replace=False)
        coords = np.stack(np.unravel_index(cells, grid[::-1]), 1)
        voxels = generator.normal(size=(len(cells), 4, 5)).astype(np.float32)
        # As OpenPCDet's shuffle_points: in testing too.
        coords = coords[np.random.permutation(len(cells))] if self.dataset_cfg.get('SHUFFLE') else coords
        if info.get('nan'):
            voxels[0] = np.nan
        if info.get('die'):
            os.kill(os.getpid(), signal.SIGKILL)
        cameras = self.dataset_cfg.get('CAMERA_CONFIG')
        images = {}
        if cameras is not None:
            shape = (info.get('views', cameras.VIEWS), 3, *cameras.SIZE)
            images['camera_imgs'] = generator.normal(size=shape).astype(np.float32)
        return {
            **images,
            'frame_id': info['token'],
            'voxels': voxels,
            'voxel_coords': coords,
            'voxel_num_points': np.full(len(cells), 4),
            'gt_boxes': np.array([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]], np.float32),
        }


__all__ = {'DatasetTemplate': DatasetTemplate, 'NuScenesDataset': NuScenesDataset}


def build_dataloader(
    dataset_cfg,
    class_names,
    batch_size,
    dist,
    root_path=None,
    workers=4,
    seed=None,
    logger=None,
    training=True,
    merge_all_iters_to_one_epoch=False,
    total_epochs=0,
):
    dataset = __all__[dataset_cfg.DATASET](
        dataset_cfg=dataset_cfg,
        class_names=class_names,
        root_path=root_path,
        training=training,
        logger=logger,
    )
    sampler = torch.utils.data.SequentialSampler(dataset)
    loader = DataLoader(dataset, batch_size, sampler=sampler, collate_fn=dataset.collate_batch)
    return dataset, loader, sampler
