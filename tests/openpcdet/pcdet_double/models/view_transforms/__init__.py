"""The registry of view transforms."""

from .depth_lss import DepthLSSTransform

__all__ = {'DepthLSSTransform': DepthLSSTransform}
