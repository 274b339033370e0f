"""The registry of dense heads."""

from .anchor_head_single import AnchorHeadSingle
from .center_head import CenterHead

__all__ = {'AnchorHeadSingle': AnchorHeadSingle, 'CenterHead': CenterHead}
