"""The registry of image backbones. The real one has a Swin; here are three levels of convolutions."""

from torch import nn


class SwinTransformer(nn.Module):
    def __init__(self, model_cfg):
        super().__init__()
        self.stages, inside = nn.ModuleList(), 3
        for i, channels in enumerate(model_cfg.CHANNELS):
            stride = 2 if i else 8
            layer = nn.Conv2d(inside, channels, stride, stride=stride, bias=False)
            self.stages.append(nn.Sequential(layer, nn.BatchNorm2d(channels), nn.ReLU()))
            inside = channels

    def init_weights(self):
        pass

    def forward(self, batch_dict):
        x, levels = batch_dict['camera_imgs'].flatten(0, 1), []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        batch_dict['image_features'] = levels
        return batch_dict


__all__ = {'SwinTransformer': SwinTransformer}
