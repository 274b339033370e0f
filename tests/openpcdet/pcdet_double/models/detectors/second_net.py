"""One-stage detector with anchors."""

from .centerpoint import CenterPoint


class SECONDNet(CenterPoint):
    pass
