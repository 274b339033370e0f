"""Keeps of a training checkpoint what testing needs: the weights and, for MMDetection3D, the classes.

    q3d strip-checkpoint work_dirs/toy_centerpoint_voxel/epoch_14.pth OUT.pth
    q3d strip-checkpoint checkpoint_epoch_8.pth OUT.pth --half --compress

Checkpoints of MMDetection3D and of OpenPCDet.
"""

import argparse
import contextlib
import zipfile
from pathlib import Path
from typing import List, Optional

import torch

from q3d_plugin import safe_load
from q3d_plugin.checkpoint_file import check_checkpoint_file
from q3d_plugin.errors import Q3DError
from q3d_plugin.files import replacing


def stripped(given: dict, half: bool) -> dict:
    """Selects the part of a checkpoint that is kept.

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
    """Reads, strips and writes."""
    check_checkpoint_file(str(checkpoint))
    if not out.parent.is_dir():
        raise Q3DError(f'{out}: the folder {out.parent} does not exist')
    with contextlib.suppress(ImportError):
        import q3d_plugin.mmdet3d  # noqa: F401  (declares MMEngine's classes safe to load)
    from q3d_plugin.openpcdet.checkpoints import trust_openpcdet_checkpoints

    trust_openpcdet_checkpoints()
    content = stripped(safe_load.load(str(checkpoint)), half)
    with replacing(out) as temporary:
        torch.save(content, temporary)
        if deflate:
            with replacing(temporary) as packed:
                compress(temporary, packed)


def main(argv: Optional[List[str]] = None) -> int:
    """Writes the stripped checkpoint; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('out', type=Path)
    parser.add_argument('--half', action='store_true', help='weights as float16: half the size')
    parser.add_argument('--compress', action='store_true', help='deflate the file: about 7 %% smaller')
    args = parser.parse_args(argv)
    before = args.checkpoint.stat().st_size if args.checkpoint.is_file() else 0
    strip(args.checkpoint, args.out, args.half, args.compress)
    print(f'{args.out}: {args.out.stat().st_size / 1e6:.2f} MB of {before / 1e6:.2f} MB')
    return 0
