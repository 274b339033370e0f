"""Measures what quantization costs: time and memory of a model, float and quantized, side by side in one run.

    q3d benchmark [PART ...] [--config CONFIG] [--frame POINTS.bin|FOLDER] [--out RESULT.json]

Part ptq: the statistics pass and the simulated INT8 forward against the float forward, the ranges of the
whole model by every calibrator, and the peak memory. pytorch-quantization's own calibrators are the peer:
they see the same tensors in the same run, where they run on this machine. The weights are random (seeded) and
the BatchNorm statistics are those of the frame, so no checkpoint is needed.

Part qat: a step of quantization-aware training by kind of range against a float one, in time and memory, with
pytorch-quantization's own fake quantization as the peer; on CUDA also forward passes and steps in half
precision.
"""

import argparse
import contextlib
import dataclasses
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from tqdm import tqdm

from q3d_plugin.benchmark.frame import generated_frame
from q3d_plugin.benchmark.parts import PARTS, chosen_parts
from q3d_plugin.benchmark.subject import Subject
from q3d_plugin.benchmark.tables import table
from q3d_plugin.commands._common import as_command
from q3d_plugin.errors import Q3DError
from q3d_plugin.files import check_writable, write_json
from q3d_plugin.frame import Frame, read_frame
from q3d_plugin.shipped import find_shipped

__all__ = ['main']

CONFIG = 'configs/mmdet3d/centerpoint_voxel0075_second_secfpn_nus_w8a8.py'
OUT = 'work_dirs/benchmark/benchmark.json'


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in the help, and the description as it is written."""


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The arguments.

    Raises:
        Q3DError: A number is too small.
    """
    parser = argparse.ArgumentParser(
        prog='q3d benchmark', description=__doc__, formatter_class=_Formatter, allow_abbrev=False
    )
    parser.add_argument('parts', nargs='*', metavar='PART', help=f'of {", ".join(PARTS)}; all where none is')
    parser.add_argument(
        '--config', default=CONFIG, help='with Quant types and a recipe; .py: MMDetection3D, .yaml: OpenPCDet'
    )
    parser.add_argument(
        '--frame',
        help='points as float32 x y z intensity ring, or a folder with points, camera images and an info '
        'file; a generated frame where not given',
    )
    parser.add_argument(
        '--data',
        type=Path,
        metavar='FOLDER',
        help="the config's data set: a training step reads its first frame and has the detector's own loss",
    )
    parser.add_argument('--repeats', type=int, default=5, help='rounds that are timed')
    parser.add_argument('--out', default=OUT, help='JSON file for the table')
    parser.add_argument('--threads', type=int, help="threads of the CPU; torch's own choice where not given")
    parser.add_argument(
        '--entropy-tensors', type=int, default=4, help="activations that the peer's entropy is timed on"
    )
    parser.add_argument('--strict', action='store_true', help='exit with 1 where a target is missed')
    args = parser.parse_args(argv)
    for name, least in (('repeats', 1), ('threads', 1), ('entropy_tensors', 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            option = name.replace('_', '-')
            raise Q3DError(f'--{option}: {value} was given; an integer from {least} up would work')
    return args


@contextlib.contextmanager
def frame_of(path: Optional[str]) -> Iterator[Frame]:
    """The frame of a path; a generated one, whose files are there while the context lasts, where None.

    Raises:
        Q3DError: The path is of no frame.
    """
    if path is not None:
        yield read_frame(path)
        return
    with tempfile.TemporaryDirectory(prefix='q3d-frame-') as folder:
        yield generated_frame(Path(folder))


def facts(subject: Subject, args: argparse.Namespace) -> Dict[str, Any]:
    """What was measured, on what, and with what, in plain data without folders of this machine."""
    device = subject.device
    return {
        'config': Path(args.config).name,
        'recipe_target': getattr(subject.recipe, 'target', None),
        'loss': 'of the outputs' if subject.annotated is None else "the detector's own",
        'frame': 'generated' if args.frame is None else 'recorded',
        'points': subject.points,
        'images': subject.images,
        'voxels': subject.adapter.voxels(subject.inputs),
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu',
        'threads': torch.get_num_threads(),
        'rounds': args.repeats,
        'activations': len(subject.activations),
        'weights': len(subject.weights),
        'torch': torch.__version__,
        'python': platform.python_version(),
    }


def headline(meta: Dict[str, Any]) -> str:
    """The first line of the table."""
    target = f' for {meta["recipe_target"]}' if meta['recipe_target'] else ''
    voxels = '' if meta['voxels'] is None else f', {meta["voxels"]} voxels'
    voxels += f', {meta["images"]} images' if meta['images'] else ''
    return (
        f'{meta["config"]}{target}: {meta["frame"]} frame, {meta["points"]} points{voxels}; '
        f'{meta["device"]}, {meta["threads"]} threads, {meta["rounds"]} rounds; '
        f'{meta["activations"]} activation and {meta["weights"]} weight quantizers'
    )


def run(argv: Optional[List[str]]) -> int:
    """Measures everything, prints the table and writes the file.

    Raises:
        Q3DError: The config, the frame or an option does not work.
    """
    args = parse(argv)
    args.config = find_shipped(args.config)
    parts = chosen_parts(args.parts)
    out = Path(args.out)
    if out.is_dir():
        raise Q3DError(f'--out: {args.out!r} is a folder; a file such as {OUT!r} would work')
    check_writable(out.parent)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    rows = []
    with (
        frame_of(args.frame) as frame,
        tqdm(total=sum(part.steps(args.repeats) for part in parts), desc='benchmark') as bar,
    ):
        subject = Subject(args.config, frame, device, args.data)
        for part in parts:
            rows += part.measure(subject, args.repeats, args.entropy_tensors, bar)
    meta = facts(subject, args)
    notes = [note for part in parts for note in part.notes]
    rows = [dataclasses.replace(row, recipe_target=meta['recipe_target']) for row in rows]
    print(table(rows, headline(meta), notes))
    passed = all(r.passed is not False for r in rows)
    write_json(out, {**meta, 'passed': passed, 'rows': [dataclasses.asdict(r) for r in rows], 'notes': notes})
    print(f'written to {args.out}')
    return 1 if args.strict and not passed else 0


main = as_command(run)
