"""The registry of detectors."""

from .bevfusion import BevFusion
from .centerpoint import CenterPoint
from .detector3d_template import Detector3DTemplate
from .second_net import SECONDNet

__all__ = {
    'Detector3DTemplate': Detector3DTemplate,
    'BevFusion': BevFusion,
    'CenterPoint': CenterPoint,
    'SECONDNet': SECONDNet,
}


def build_detector(model_cfg, num_class, dataset):
    return __all__[model_cfg.NAME](model_cfg=model_cfg, num_class=num_class, dataset=dataset)
