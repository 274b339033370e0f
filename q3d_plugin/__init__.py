"""Quantization of 3D detectors inside OpenPCDet and MMDetection3D, switched on by config files alone.

``import q3d_plugin`` imports no framework. The adapters do, each its own: :mod:`q3d_plugin.mmdet3d`.
"""

__version__ = '0.1.0'
