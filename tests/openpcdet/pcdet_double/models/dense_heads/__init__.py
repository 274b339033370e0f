"""The registry of dense heads."""

from .anchor_head_single import AnchorHeadSingle
from .center_head import CenterHead
from .transfusion_head import TransFusionHead

__all__ = {
    'AnchorHeadSingle': AnchorHeadSingle,
    'CenterHead': CenterHead,
    'TransFusionHead': TransFusionHead,
}
