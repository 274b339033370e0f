"""Trains a detector with its framework's own script: every argument of that script works here.

python tools/train.py CONFIG.py [arguments of MMDetection3D's tools/train.py]
"""

from q3d_plugin.launch import main

if __name__ == '__main__':
    main('train.py')
