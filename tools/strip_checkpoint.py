"""Keeps of a training checkpoint what testing needs: the weights and the data set's classes.

python tools/strip_checkpoint.py work_dirs/toy_centerpoint_voxel/epoch_14.pth OUT.pth
"""

import argparse
import os
import sys
from pathlib import Path

import torch


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('out', type=Path)
    args = parser.parse_args(argv)
    import q3d_plugin.mmdet3d  # noqa: F401  (declares MMEngine's classes safe to load)

    given = torch.load(args.checkpoint, map_location='cpu', weights_only=True)
    meta = given.get('meta', {})
    kept = {k: meta[k] for k in ('dataset_meta', 'epoch', 'q3d') if k in meta}
    temporary = args.out.with_name(f'.{args.out.name}.tmp')
    torch.save({'meta': kept, 'state_dict': given['state_dict']}, temporary)
    os.replace(temporary, args.out)
    print(
        f'{args.out}: {args.out.stat().st_size / 1e6:.1f} MB of {args.checkpoint.stat().st_size / 1e6:.1f} MB'
    )
    return 0


if __name__ == '__main__':
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or '.') != here]
    sys.exit(main())
