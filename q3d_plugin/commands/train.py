"""Trains a detector with its framework's own training script, float or quantized (QAT).

    q3d train CONFIG.py [arguments of MMDetection3D's tools/train.py]
    q3d train --cfg_file CONFIG.yaml [arguments of OpenPCDet's tools/train.py]

The plugin is registered first, and without CUDA the framework runs on the CPU. A recipe of mode 'qat' trains
a quantized model from a float checkpoint. "q3d train CONFIG.py --help" shows the arguments of MMDetection3D's
script, "q3d train --cfg_file CONFIG.yaml --help" those of OpenPCDet's. On several devices: torchrun -m
q3d_plugin train ...
"""

from typing import List, Optional

from q3d_plugin import launch

__all__ = ['main']


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the framework's ``tools/train.py``; returns the exit status."""
    return launch.main('train.py', argv, usage=__doc__)
