"""Tests a detector with its framework's own test script: every argument of that script works here.

    q3d test CONFIG.py CHECKPOINT.pth [arguments of MMDetection3D's tools/test.py]
    q3d test --cfg_file CONFIG.yaml --ckpt CHECKPOINT.pth [arguments of OpenPCDet's tools/test.py]

The plugin is registered first, and without CUDA the framework runs on the CPU. A recipe in the config
quantizes the float CHECKPOINT. "q3d test CONFIG.py --help" shows the arguments of MMDetection3D's script,
"q3d test --cfg_file CONFIG.yaml --help" those of OpenPCDet's. On several devices: torchrun -m q3d_plugin
test ...
"""

from typing import List, Optional

from q3d_plugin import launch

__all__ = ['main']


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the framework's ``tools/test.py``; returns the exit status."""
    return launch.main('test.py', argv, usage=__doc__)
