"""Many recipes on one detector: a table and maps of what each of them reaches.

    python tools/sweep.py CONFIG CHECKPOINT --grid weight.bits=8,4 activation.bits=8,4 skip=none,@skip.json
    python tools/sweep.py CONFIG CHECKPOINT --grid my_recipes.py --metric l1 --frames 4
    python tools/sweep.py CONFIG CHECKPOINT --skip-curve work_dirs/sensitivity/NAME/sensitivity.json

Each recipe is calibrated and evaluated with the framework's own metric, or (--metric l1) compared with the
raw outputs of the float model on a few frames. Results are kept as they come in sweep.json: the same command
goes on where it was interrupted, and a longer grid adds to it.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
if __name__ == '__main__':
    # Python puts this folder first on the path, where its scripts would shadow modules of the standard
    # library (profile.py, for example).
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or '.') != HERE]

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, Dict, List, Optional  # noqa: E402

from tqdm import tqdm  # noqa: E402

from q3d_plugin import files, lifecycle  # noqa: E402
from q3d_plugin.analysis import charts, command  # noqa: E402
from q3d_plugin.analysis.command import open_bench  # noqa: E402
from q3d_plugin.analysis.measures import OutputError  # noqa: E402
from q3d_plugin.analysis.sweep import (  # noqa: E402
    Entry,
    Results,
    curve_of,
    digest,
    expand,
    heat_map_of,
    parse_grid,
    skip_entries,
)
from q3d_plugin.bench import Bench, file_hash  # noqa: E402
from q3d_plugin.errors import Q3DError  # noqa: E402
from q3d_plugin.recipe import Recipe  # noqa: E402

MEASURES = {'map': ('mAP', 'NDS'), 'l1': ('relative_l1',)}


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    command.add_common(parser, 'sweep')
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
    command.at_least(args, 1, 'frames', 'calibration_frames')
    command.at_least(args, 0, 'random')
    if not args.grid and not args.skip_curve:
        raise Q3DError(
            '--grid: missing; weight.bits=8,4 or a file would work, or --skip-curve sensitivity.json'
        )
    return args


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


def measure_l1(bench: Bench, args: argparse.Namespace) -> Callable[[], Dict[str, Any]]:
    """A function that compares the model with the float one, whose outputs are computed here once."""
    spec = bench.recipe.calibration
    batches = list(bench.frames(spec.split, args.frames, spec.seed))
    lifecycle.set_enabled(bench.model, False)
    references = [{k: v.clone() for k, v in bench.forward(b).items()} for b in batches]

    def measure() -> Dict[str, Any]:
        error = OutputError()
        for reference, batch in zip(references, batches):
            error.add(reference, bench.forward(batch))
        return {'relative_l1': error.relative_l1, 'l1': error.l1, 'nan': error.nan, 'inf': error.inf}

    return measure


def table(content: Dict[str, Any], metric: str) -> str:
    """The results as text, with the difference to float."""
    measures, reference = MEASURES[metric], content.get('float') or {}
    header = ['recipe', *(m for m in measures)]
    header += [f'{m} - float' for m in measures if reference.get(m) is not None and metric == 'map']
    lines = [header]
    for entry in [{'name': 'float', 'result': reference}, *content['entries']]:
        result = entry.get('result') or {}
        line = [entry['name'], *('-' if result.get(m) is None else f'{result[m]:.4f}' for m in measures)]
        for m in measures:
            if f'{m} - float' in header:
                line.append('-' if result.get(m) is None else f'{result[m] - reference[m]:+.4f}')
        bad = (result.get('nan') or 0) + (result.get('inf') or 0)
        line[-1] += f'  {bad} NaN/Inf' if bad else ''
        line[-1] += f'  {entry["error"]}' if entry.get('error') else ''
        lines.append(line)
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(header) - 1)]
    return '\n'.join('  '.join([*(c.ljust(w) for c, w in zip(x, widths)), *x[len(widths) :]]) for x in lines)


def draw(content: Dict[str, Any], metric: str, out: Path) -> None:
    """The maps, one for each measure."""
    for measure in MEASURES[metric]:
        found = heat_map_of(content['entries'], measure)
        if found is not None:
            reference = (content.get('float') or {}).get(measure)
            title = measure + (f' (float {reference:.4f})' if reference is not None else '')
            files.write_bytes(out / f'{measure}.png', charts.heat_map(*found, title))
        lines = curve_of(content['entries'], measure)
        if lines:
            reference = (content.get('float') or {}).get(measure)
            files.write_bytes(out / f'skip_{measure}.png', charts.metric_curve(lines, measure, reference))


def run(argv: Optional[List[str]] = None) -> int:
    """Tries every recipe, prints the table and writes the files."""
    args = parse(argv)
    command.set_threads(args)
    grid, named = parse_grid(args.grid)
    out = command.out_folder(args, 'sweep')
    bench = open_bench(args.config, args.checkpoint, command.options_of(args))
    if bench.quantized:
        raise Q3DError(f'checkpoint {args.checkpoint!r} is quantized already: a sweep needs the float one')
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
        'checkpoint_sha256': file_hash(Path(args.checkpoint)),
        'config_sha256': digest(bench.settings()),
        'base recipe': base.to_dict(),
        'metric': args.metric,
        'frames': args.frames if args.metric == 'l1' else None,
    }
    results = Results(path, made_of)

    todo = [e for e in entries if results.result_of(e.recipe) is None]
    print(f'{len(entries)} recipes, {len(entries) - len(todo)} of them done before')
    bench.configure(base)
    measure = bench.evaluate if args.metric == 'map' else measure_l1(bench, args) if todo else None
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
    files.write_bytes(out / 'table.txt', (text + '\n').encode())
    rows = [
        {'name': e['name'], **{m: (e.get('result') or {}).get(m) for m in MEASURES[args.metric]}}
        for e in results.content['entries']
    ]
    files.write_csv(out / 'sweep.csv', rows)
    draw(results.content, args.metric, out)
    print(f'written to {out}')
    return 0


def main(argv: Optional[List[str]] = None) -> int:
    """The command; returns its exit status."""
    return command.guarded(run, argv)


if __name__ == '__main__':
    sys.exit(main())
