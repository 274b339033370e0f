"""The detector."""

import numpy as np
import torch
from mmdet3d.models import Base3DDetector
from mmdet3d.registry import MODELS
from torch.nn import functional as F

from .ops import Voxelization

MATRICES = ('lidar2img', 'cam2img', 'cam2lidar', 'img_aug_matrix', 'lidar_aug_matrix')


@MODELS.register_module()
class BEVFusion(Base3DDetector):
    def __init__(
        self,
        data_preprocessor=None,
        pts_voxel_encoder=None,
        pts_middle_encoder=None,
        fusion_layer=None,
        img_backbone=None,
        pts_backbone=None,
        view_transform=None,
        img_neck=None,
        pts_neck=None,
        bbox_head=None,
        init_cfg=None,
        seg_head=None,
        **kwargs,
    ):
        voxelize_cfg = data_preprocessor.pop('voxelize_cfg')
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.voxelize_reduce = voxelize_cfg.pop('voxelize_reduce')
        self.pts_voxel_layer = Voxelization(**voxelize_cfg)
        parts = dict(
            pts_voxel_encoder=pts_voxel_encoder,
            img_backbone=img_backbone,
            img_neck=img_neck,
            view_transform=view_transform,
            pts_middle_encoder=pts_middle_encoder,
            fusion_layer=fusion_layer,
            pts_backbone=pts_backbone,
            pts_neck=pts_neck,
            bbox_head=bbox_head,
        )
        for name, part in parts.items():
            setattr(self, name, None if part is None else MODELS.build(part))
        self.init_weights()

    def init_weights(self):
        if self.img_backbone is not None:
            self.img_backbone.init_weights()

    def _forward(self, batch_inputs_dict, batch_data_samples=None):
        pass

    def extract_img_feat(self, images, points, metas):
        frames, views = images.shape[:2]
        x = self.img_neck(self.img_backbone(images.flatten(0, 1).contiguous()))[0]
        matrices = []
        for name in MATRICES:
            default = np.eye(4)
            matrices.append(images.new_tensor(np.asarray([meta.get(name, default) for meta in metas])))
        with torch.autocast(device_type='cuda', dtype=torch.float32):
            return self.view_transform(x.unflatten(0, (frames, views)), points, *matrices, metas)

    @torch.no_grad()
    def voxelize(self, points):
        features, cells = [], []
        for i, frame in enumerate(points):
            voxels, coordinates, counts = self.pts_voxel_layer(frame)
            features.append(voxels.sum(1) / counts.type_as(voxels).view(-1, 1))
            cells.append(F.pad(coordinates, (1, 0), value=i))
        return torch.cat(features), torch.cat(cells)

    def extract_pts_feat(self, batch_inputs_dict):
        with torch.autocast('cuda', enabled=False):
            features, cells = self.voxelize([p.float() for p in batch_inputs_dict['points']])
        return self.pts_middle_encoder(features, cells, cells[-1, 0] + 1)

    def extract_feat(self, batch_inputs_dict, batch_input_metas, **kwargs):
        images, maps = batch_inputs_dict.get('imgs'), []
        if images is not None:
            points = [p.clone() for p in batch_inputs_dict['points']]
            maps.append(self.extract_img_feat(images, points, batch_input_metas))
        maps.append(self.extract_pts_feat(batch_inputs_dict))
        if self.fusion_layer is not None:
            x = self.fusion_layer(maps)
        else:
            assert len(maps) == 1
            x = maps[0]
        return self.pts_neck(self.pts_backbone(x))

    def predict(self, batch_inputs_dict, batch_data_samples, **kwargs):
        metas = [sample.metainfo for sample in batch_data_samples]
        return self.bbox_head.predict(self.extract_feat(batch_inputs_dict, metas), metas)

    def loss(self, batch_inputs_dict, batch_data_samples, **kwargs):
        metas = [sample.metainfo for sample in batch_data_samples]
        return self.bbox_head.loss(self.extract_feat(batch_inputs_dict, metas), batch_data_samples)
