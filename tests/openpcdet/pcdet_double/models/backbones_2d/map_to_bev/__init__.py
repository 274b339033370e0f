"""The registry of what turns voxels into a bird's eye view."""

from torch import nn


class HeightCompression(nn.Module):
    def __init__(self, model_cfg, **kwargs):
        super().__init__()
        self.num_bev_features = model_cfg.NUM_BEV_FEATURES

    def forward(self, batch_dict):
        batch_dict['spatial_features'] = batch_dict['encoded_spconv_tensor'].dense().flatten(1, 2)
        return batch_dict


__all__ = {'HeightCompression': HeightCompression}
