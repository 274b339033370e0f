"""Tests a detector with its framework's own script: every argument of that script works here.

python tools/test.py CONFIG.py CHECKPOINT.pth [arguments of MMDetection3D's tools/test.py]
"""

from q3d_plugin.launch import main

if __name__ == '__main__':
    main('test.py')
