"""Keeps of a training checkpoint what testing needs: the weights and, for MMDetection3D, the classes.

python tools/strip_checkpoint.py work_dirs/toy_centerpoint_voxel/epoch_14.pth OUT.pth
python tools/strip_checkpoint.py checkpoint_epoch_8.pth OUT.pth --half --compress

Checkpoints of MMDetection3D and of OpenPCDet.
"""

import argparse
import contextlib
import os
import sys
import zipfile
from pathlib import Path

import torch

from q3d_plugin import safe_load
from q3d_plugin.checkpoint_file import check_checkpoint_file
from q3d_plugin.errors import Q3DError


def stripped(given: dict, half: bool) -> dict:
    """What is kept of a checkpoint.

    Args:
        given: The content of the file, of either framework.
        half: Whether tensors with more than one axis (weights, not BatchNorms) become float16.

    Raises:
        Q3DError: It is no checkpoint of either framework.
    """
    key = next((k for k in ('state_dict', 'model_state') if isinstance(given, dict) and k in given), None)
    if key is None:
        raise Q3DError('no checkpoint of MMDetection3D or OpenPCDet: it has no state_dict and no model_state')
    state = given[key]
    for name, tensor in state.items():  # in place, for the layout versions in its _metadata
        narrow = half and tensor.dtype == torch.float32 and tensor.dim() > 1
        state[name] = (tensor.half() if narrow else tensor).clone()
    if key == 'model_state':
        return {key: state}
    meta = given.get('meta', {})
    return {'meta': {k: meta[k] for k in ('dataset_meta', 'epoch', 'q3d') if k in meta}, key: state}


def compress(source: Path, out: Path) -> None:
    """Writes a checkpoint file with its records deflated; ``torch.load`` reads it like any other."""
    with zipfile.ZipFile(source) as a, zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED, compresslevel=9) as b:
        for record in a.infolist():
            b.writestr(zipfile.ZipInfo(record.filename), a.read(record), zipfile.ZIP_DEFLATED, 9)


def strip(checkpoint: Path, out: Path, half: bool, deflate: bool) -> None:
    """Reads, strips and writes; ``out`` appears whole or not at all."""
    check_checkpoint_file(str(checkpoint))
    if not out.parent.is_dir():
        raise Q3DError(f'{out}: the folder {out.parent} does not exist')
    with contextlib.suppress(ImportError):
        import q3d_plugin.mmdet3d  # noqa: F401  (declares MMEngine's classes safe to load)
    from q3d_plugin.openpcdet.checkpoints import trust_openpcdet_checkpoints

    trust_openpcdet_checkpoints()
    content = stripped(safe_load.load(str(checkpoint)), half)
    temporary, packed = (out.with_name(f'.{out.name}.{i}.tmp') for i in range(2))
    try:
        torch.save(content, temporary)
        if deflate:
            compress(temporary, packed)
        os.replace(packed if deflate else temporary, out)
    finally:
        for file in (temporary, packed):
            file.unlink(missing_ok=True)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('out', type=Path)
    parser.add_argument('--half', action='store_true', help='weights as float16: half the size')
    parser.add_argument('--compress', action='store_true', help='deflate the file: about 7 %% smaller')
    args = parser.parse_args(argv)
    before = args.checkpoint.stat().st_size if args.checkpoint.is_file() else 0
    try:
        strip(args.checkpoint, args.out, args.half, args.compress)
    except Q3DError as error:
        print(f'strip_checkpoint: {error}', file=sys.stderr)
        return 2
    print(f'{args.out}: {args.out.stat().st_size / 1e6:.2f} MB of {before / 1e6:.2f} MB')
    return 0


if __name__ == '__main__':
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or '.') != here]
    sys.exit(main())
