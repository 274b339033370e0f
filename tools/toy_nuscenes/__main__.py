"""Runs the generator: `python tools/toy_nuscenes --out DIR`."""

import os
import sys
from pathlib import Path

# The processes share the cores already; threads of the linear algebra would only wait for each other.
# To be set before NumPy is imported.
for _name in ('OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS'):
    os.environ.setdefault(_name, '1')

if __package__:
    from .generate import main
else:
    # Python puts a folder that it runs on the path, where `tables` or `scene` would shadow packages.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from toy_nuscenes.generate import main

if __name__ == '__main__':
    sys.exit(main())
