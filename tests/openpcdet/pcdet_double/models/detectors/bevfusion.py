"""Detector whose map is that of the LiDAR joined with that of the cameras."""

from .. import backbones_image, view_transforms
from ..backbones_2d import fuser
from ..backbones_image import img_neck
from .detector3d_template import Detector3DTemplate


class BevFusion(Detector3DTemplate):
    def __init__(self, model_cfg, num_class, dataset):
        super().__init__(model_cfg=model_cfg, num_class=num_class, dataset=dataset)
        *before, backbone_2d, head = self.build_networks()
        registries = {
            'image_backbone': backbones_image,
            'neck': img_neck,
            'vtransform': view_transforms,
            'fuser': fuser,
        }
        cameras = []
        for name, registry in registries.items():
            part = model_cfg[name.upper()]
            setattr(self, name, registry.__all__[part.NAME](model_cfg=part))
            cameras.append(getattr(self, name))
        self.module_list = [*before, *cameras, backbone_2d, head]

    def forward(self, batch_dict):
        for module in self.module_list:
            batch_dict = module(batch_dict)
        return batch_dict['final_box_dicts'], {}
