"""The registry of image necks."""

from .generalized_lss import GeneralizedLSSFPN

__all__ = {'GeneralizedLSSFPN': GeneralizedLSSFPN}
