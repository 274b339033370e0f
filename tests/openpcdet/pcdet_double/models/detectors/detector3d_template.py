"""How a detector is put together, and how it loads checkpoints."""

import os

import torch
from torch import nn

from ...utils.spconv_utils import find_all_spconv_keys
from .. import backbones_2d, backbones_3d, dense_heads
from ..backbones_2d import map_to_bev
from ..backbones_3d import vfe


class Detector3DTemplate(nn.Module):
    def __init__(self, model_cfg, num_class, dataset):
        super().__init__()
        self.model_cfg, self.num_class, self.dataset = model_cfg, num_class, dataset
        self.class_names = dataset.class_names
        self.register_buffer('global_step', torch.LongTensor(1).zero_())

    def update_global_step(self):
        self.global_step += 1

    def build_networks(self):
        cfg, data = self.model_cfg, self.dataset
        place = {
            'grid_size': data.grid_size,
            'voxel_size': data.voxel_size,
            'point_cloud_range': data.point_cloud_range,
        }
        channels = data.point_feature_encoder.num_point_features
        self.vfe = vfe.__all__[cfg.VFE.NAME](model_cfg=cfg.VFE, num_point_features=channels, **place)
        modules, channels = [self.vfe], self.vfe.get_output_feature_dim()
        if 'BACKBONE_3D' in cfg:
            self.backbone_3d = backbones_3d.__all__[cfg.BACKBONE_3D.NAME](
                model_cfg=cfg.BACKBONE_3D, input_channels=channels, **place
            )
            modules.append(self.backbone_3d)
        self.map_to_bev_module = map_to_bev.__all__[cfg.MAP_TO_BEV.NAME](
            model_cfg=cfg.MAP_TO_BEV, grid_size=data.grid_size
        )
        self.backbone_2d = backbones_2d.__all__[cfg.BACKBONE_2D.NAME](
            model_cfg=cfg.BACKBONE_2D, input_channels=self.map_to_bev_module.num_bev_features
        )
        self.dense_head = dense_heads.__all__[cfg.DENSE_HEAD.NAME](
            model_cfg=cfg.DENSE_HEAD,
            input_channels=self.backbone_2d.num_bev_features,
            num_class=self.num_class,
            class_names=self.class_names,
            predict_boxes_when_training=False,
            **place,
        )
        return [*modules, self.map_to_bev_module, self.backbone_2d, self.dense_head]

    def _load_state_dict(self, model_state_disk, *, strict=True):
        state_dict, sparse, update = self.state_dict(), find_all_spconv_keys(self), {}
        for key, value in model_state_disk.items():
            if key not in state_dict:
                continue
            wanted = state_dict[key].shape
            if key in sparse and value.shape != wanted:
                if value.transpose(-1, -2).shape == wanted:
                    value = value.transpose(-1, -2).contiguous()
                else:
                    assert value.dim() == 5, 'currently only spconv 3D is supported'
                    value = value.permute(4, 0, 1, 2, 3).contiguous()
            if value.shape == wanted:
                update[key] = value
        self.load_state_dict(update if strict else {**state_dict, **update})
        return state_dict, update

    def load_params_from_file(self, filename, logger, to_cpu=False, pre_trained_path=None):
        if not os.path.isfile(filename):
            raise FileNotFoundError
        state = torch.load(filename, map_location='cpu')['model_state']
        if pre_trained_path is not None:
            state.update(torch.load(pre_trained_path, map_location='cpu')['model_state'])
        self._load_state_dict(state, strict=False)

    def load_params_with_optimizer(self, filename, to_cpu=False, optimizer=None, logger=None):
        if not os.path.isfile(filename):
            raise FileNotFoundError
        checkpoint = torch.load(filename, map_location='cpu')
        self._load_state_dict(checkpoint['model_state'], strict=True)
        if optimizer is not None and checkpoint.get('optimizer_state') is not None:
            optimizer.load_state_dict(checkpoint['optimizer_state'])
        return checkpoint.get('it', 0.0), checkpoint.get('epoch', -1)
