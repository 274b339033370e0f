"""The types of projects/BEVFusion that have a Quant type: same names, same attributes, same data flow."""

from .bevfusion import BEVFusion
from .bevfusion_necks import GeneralizedLSSFPN
from .depth_lss import DepthLSSTransform, LSSTransform
from .sparse_encoder import BEVFusionSparseEncoder
from .transfusion_head import ConvFuser, TransFusionHead

__all__ = [
    'BEVFusion',
    'BEVFusionSparseEncoder',
    'ConvFuser',
    'DepthLSSTransform',
    'GeneralizedLSSFPN',
    'LSSTransform',
    'TransFusionHead',
]
