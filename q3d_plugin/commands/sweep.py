"""Tries many recipes on one detector: a table and maps of what each of them reaches.

    q3d sweep CONFIG CHECKPOINT --grid weight.bits=8,4 activation.bits=8,4 skip=none,@skip.json
    q3d sweep CONFIG CHECKPOINT --grid my_recipes.py --metric l1 --frames 4
    q3d sweep CONFIG CHECKPOINT --skip-curve work_dirs/sensitivity/NAME/sensitivity.json

Each recipe is calibrated and evaluated with the framework's own metric, or (--metric l1) compared with the
raw outputs of the float model on a few frames. Results are kept as they come in sweep.json: the same command
goes on where it was interrupted, and a longer grid adds to it.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Dict, List, Optional

from tqdm import tqdm

from q3d_plugin import files, lifecycle
from q3d_plugin.analysis import opening
from q3d_plugin.analysis.plans import Entry, expand, parse_grid, skip_entries
from q3d_plugin.analysis.sweep import MEASURES, Results, digest, measure_l1, pictures, rows_of, table
from q3d_plugin.bench import file_hash
from q3d_plugin.commands import _common
from q3d_plugin.errors import Q3DError
from q3d_plugin.frame import read_frame
from q3d_plugin.recipe import Recipe

__all__ = ['main']


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The arguments."""
    parser = _common.parser_of('sweep', __doc__)
    _common.add_common(parser, 'sweep')
    _common.add_frame(parser)
    parser.add_argument(
        '--grid',
        nargs='+',
        default=[],
        metavar='KEY=V,V',
        help='or a .py or .json file with grid, recipes',
    )
    parser.add_argument(
        '--metric', choices=tuple(MEASURES), default='map', help="default: the framework's own"
    )
    parser.add_argument('--frames', type=int, default=4, help='frames of --metric l1 (default: 4)')
    parser.add_argument('--calibration-frames', type=int, help="default: the recipe's")
    parser.add_argument(
        '--skip-curve', metavar='SENSITIVITY.JSON', help='leave more and more of its layers float'
    )
    parser.add_argument(
        '--lengths',
        default='0,1,2,5,10,20,40',
        help='of the lists of --skip-curve (default: 0,1,2,5,10,20,40)',
    )
    parser.add_argument('--random', type=int, default=1, help='random orders beside it (default: 1)')
    parser.add_argument('--fresh', action='store_true', help='begin anew, whatever results there are')
    args = parser.parse_args(argv)
    _common.at_least(args, 1, 'frames', 'calibration_frames')
    _common.at_least(args, 0, 'random')
    if args.frame and args.metric != 'l1':
        raise Q3DError('--frame: one frame has no mAP; --metric l1 would work')
    if not args.grid and not args.skip_curve:
        raise Q3DError(
            '--grid: missing; weight.bits=8,4 or a file would work, or --skip-curve sensitivity.json'
        )
    return args


def frame_name(args: argparse.Namespace) -> str:
    """The name of the frame that was given; empty where none was."""
    return Path(args.frame).resolve().name if args.frame else ''


def all_entries(args: argparse.Namespace, grid: Dict, named: List, base: Recipe) -> List[Entry]:
    """The recipes of the grid, then those of the curve."""
    entries = expand(base, grid, named) if args.grid else []
    if args.skip_curve:
        try:
            lengths = [int(n) for n in args.lengths.split(',')]
        except ValueError:
            raise Q3DError(
                f'--lengths: {args.lengths!r} was given; numbers such as 0,5,20 would work'
            ) from None
        content = files.read_json(Path(args.skip_curve), '--skip-curve')
        entries += skip_entries(base, content, lengths, args.random, args.skip_curve)
    return entries


def run(argv: Optional[List[str]] = None) -> int:
    """Tries every recipe, prints the table and writes the files."""
    args = parse(argv)
    _common.set_threads(args)
    grid, named = parse_grid(args.grid)
    out = _common.out_folder(args, 'sweep')
    bench = opening.open_bench(args.config, args.checkpoint, _common.options_of(args))
    if bench.quantized:
        raise Q3DError(f'checkpoint {args.checkpoint!r} is quantized already: a sweep needs the float one')
    if args.frame:
        bench.use_frame(read_frame(args.frame))
    base = bench.recipe
    if args.calibration_frames:
        calibration = dataclasses.replace(base.calibration, frames=args.calibration_frames)
        base = dataclasses.replace(base, calibration=calibration)
    entries = all_entries(args, grid, named, base)
    for entry in entries:
        # Patterns that match nothing, before anything long begins.
        try:
            lifecycle.configure(bench.model, entry.recipe)
        except Q3DError as error:
            raise Q3DError(f'{error} (in the sweep: {entry.name})') from error
    path = out / 'sweep.json'
    if args.fresh:
        path.unlink(missing_ok=True)
    made_of = {
        'checkpoint_sha256': file_hash(bench.checkpoint),
        'config_sha256': digest(bench.settings()),
        'base recipe': base.to_dict(),
        'metric': args.metric,
        'frames': (frame_name(args) or args.frames) if args.metric == 'l1' else None,
    }
    results = Results(path, made_of)

    todo = [e for e in entries if results.result_of(e.recipe) is None]
    print(f'{len(entries)} recipes, {len(entries) - len(todo)} of them done before')
    bench.configure(base)
    measure = bench.evaluate if args.metric == 'map' else measure_l1(bench, args.frames) if todo else None
    if args.metric == 'map' and results.content['float'] is None:
        bench.prepare(Recipe.from_dict({**base.to_dict(), 'mode': 'float'}))
        results.set_float(bench.evaluate())
    with tqdm(todo, desc='sweep', unit='recipe') as bar:
        for entry in bar:
            bar.set_postfix_str(entry.name)
            start, result, error = time.perf_counter(), None, ''
            try:
                bench.prepare(entry.recipe)
                result = measure()
            except Q3DError as failed:
                error = str(failed)
            results.add(entry, result, time.perf_counter() - start, error)
    text = table(results.content, args.metric)
    print(text)
    files.write_text(out / 'table.txt', text)
    files.write_csv(out / 'sweep.csv', rows_of(results.content, args.metric))
    for name, content in pictures(results.content, MEASURES[args.metric]).items():
        files.write_bytes(out / f'{name}.png', content)
    print(f'written to {out}')
    return 0


main = _common.as_command(run)
