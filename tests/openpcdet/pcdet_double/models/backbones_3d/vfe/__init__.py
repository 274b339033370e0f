"""The registry of voxel feature encoders."""

from torch import nn


class MeanVFE(nn.Module):
    def __init__(self, model_cfg, num_point_features, **kwargs):
        super().__init__()
        self.num_point_features = num_point_features

    def get_output_feature_dim(self):
        return self.num_point_features

    def forward(self, batch_dict, **kwargs):
        number = batch_dict['voxel_num_points'].view(-1, 1).clamp(min=1)
        batch_dict['voxel_features'] = batch_dict['voxels'].sum(1) / number
        return batch_dict


__all__ = {'MeanVFE': MeanVFE}
