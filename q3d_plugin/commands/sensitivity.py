"""Which layers suffer from quantization, and which ones to leave float.

    python tools/sensitivity.py CONFIG CHECKPOINT [--frames N] [--keep-output-error 0.01] [--max-skipped 20]

Every layer is quantized alone and compared with float: its own output, and the raw outputs of the detector.
Then the shortest list of layers is looked for that, left float, brings the outputs within the budget with
everything else quantized. Results: table.txt, sensitivity.json, .csv and .png, skip.txt (to paste into the
config) and skip.json (for tools/sweep.py), in --out.
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
from pathlib import Path  # noqa: E402
from typing import Any, Dict, List, Optional  # noqa: E402

from q3d_plugin import files, lifecycle  # noqa: E402
from q3d_plugin.analysis import charts, command, sensitivity  # noqa: E402
from q3d_plugin.analysis.command import open_bench  # noqa: E402
from q3d_plugin.analysis.replay import Replay  # noqa: E402
from q3d_plugin.bench import Bench, file_hash  # noqa: E402
from q3d_plugin.errors import Q3DError  # noqa: E402
from q3d_plugin.layers import QuantWeightLayer  # noqa: E402
from q3d_plugin.recipe import Recipe  # noqa: E402

# Frames of calibration that tell which layers are worse than others; that of a full-size detector with 300
# frames takes longer than everything here.
ENOUGH = 32

COLUMNS = (
    ('l1', 'L1', '.3g'),
    ('relative_l1', 'rel. L1', '.4f'),
    ('sqnr_db', 'SQNR dB', '.1f'),
    ('cosine', 'cosine', '.5f'),
    ('nan', 'NaN', 'd'),
    ('inf', 'Inf', 'd'),
    ('float_nonfinite', 'bad float', 'd'),
    ('output_l1', 'out L1', '.3g'),
    ('output_relative_l1', 'out rel.', '.5f'),
    ('output_nan', 'out NaN', 'd'),
    ('output_inf', 'out Inf', 'd'),
    ('reverse_relative_l1', 'without it', '.5f'),
)


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    command.add_common(parser, 'sensitivity')
    parser.add_argument('--frames', type=int, default=4, help='frames to measure on (default: 4)')
    parser.add_argument('--split', choices=('train', 'val', 'test'), help="default: the recipe's calibration")
    parser.add_argument('--seed', type=int, help="chooses the frames (default: the recipe's)")
    parser.add_argument(
        '--calibration-frames',
        type=int,
        help=f"frames that ranges are taken from (default: the recipe's, at most {ENOUGH} or --frames)",
    )
    parser.add_argument('--bits', type=int, nargs=2, metavar=('W', 'A'), help="in place of the recipe's")
    parser.add_argument('--local', action='store_true', help='only the own errors of the layers: one pass')
    parser.add_argument('--reverse', action='store_true', help='also everything quantized but one layer')
    parser.add_argument('--group', help="a depth such as 1, or patterns: 'pts_backbone,*head*'")
    parser.add_argument('--keep-output-error', type=float, default=0.01, metavar='E', help='default: 0.01')
    parser.add_argument(
        '--keep-map',
        type=float,
        metavar='POINTS',
        help="choose by the framework's own metric instead: the shortest list that loses at most so many "
        'points of mAP (0.3, say) against float, by a few evaluations',
    )
    parser.add_argument('--max-skipped', type=int, default=20, metavar='N', help='default: 20')
    parser.add_argument(
        '--candidates', type=int, default=8, help='layers tried at each step, at least (default: 8)'
    )
    parser.add_argument(
        '--trial-frames',
        type=int,
        default=1,
        help='frames that the choice among them is made on (default: 1)',
    )
    parser.add_argument('--no-skip-list', action='store_true', help='only the table')
    parser.add_argument(
        '--treat',
        choices=('float', 'standard'),
        default='float',
        help='listed layers stay float, or are quantized without SmoothQuant (default: float)',
    )
    args = parser.parse_args(argv)
    command.at_least(args, 1, 'frames', 'calibration_frames', 'max_skipped', 'candidates', 'trial_frames')
    command.at_least(args, 0, 'keep_output_error', 'keep_map', 'seed')
    if args.keep_map is not None and (args.treat != 'float' or args.local or args.group or args.no_skip_list):
        raise Q3DError(
            '--keep-map: it chooses layers to leave float, so it does not go with --treat standard, '
            '--local, --group or --no-skip-list'
        )
    return args


def chosen_recipe(recipe: Recipe, args: argparse.Namespace, quantized: bool = False) -> Recipe:
    """The config's recipe with what the command line changes."""
    plain = recipe.to_dict()
    if recipe.mode == 'float':
        raise Q3DError("recipe.mode: 'float' quantizes nothing; 'ptq' would work")
    if args.bits:
        for key, bits in zip(('weight', 'activation'), args.bits):
            plain[key] = {**(plain[key] or {}), 'bits': bits}
    # A quantized checkpoint has ranges, and is known by its recipe.
    most = recipe.calibration.frames if quantized else max(ENOUGH, args.frames)
    frames = args.calibration_frames or min(recipe.calibration.frames, most)
    if frames < recipe.calibration.frames:
        print(
            f'ranges of {frames} frames, of which the recipe has {recipe.calibration.frames}: '
            '--calibration-frames takes more'
        )
    plain['calibration']['frames'] = frames
    if args.treat == 'standard' and not plain.get('smoothquant'):
        raise Q3DError(
            "--treat: 'standard' takes SmoothQuant from listed layers, and the recipe has no smoothquant; "
            "'float' would work"
        )
    return Recipe.from_dict(plain)


def prepare(bench: Bench, recipe: Recipe) -> List[str]:
    """Gives the model ranges; names of the layers that a NaN came to."""
    if bench.quantized:
        if recipe != bench.recipe:
            raise Q3DError(f'checkpoint {str(bench.checkpoint)!r} is quantized already: give the float one')
        return []
    spec = recipe.calibration
    frames = bench.frames(spec.split, spec.frames, spec.seed)
    return sensitivity.calibrate(
        bench.model, frames, bench.forward, lambda: bench.prepare(recipe, frames, 'calibration')
    )


def float_map(bench: Bench, switch: sensitivity.Switch) -> float:
    """mAP of the float model, by the framework's own evaluation."""
    with switch.restored():
        switch.only(())
        found = bench.evaluate()['mAP']
    if found is None:
        raise Q3DError("--keep-map: this data set's metric has no mAP; --keep-output-error would work")
    return found


def table(rows: List[sensitivity.Row]) -> str:
    """The rows as text; columns without a value are left out."""
    shown = [c for c in COLUMNS if any(getattr(r, c[0]) is not None for r in rows)]
    shown = [c for c in shown if c[2] != 'd' or any(getattr(r, c[0]) for r in rows) or c[0] in ('nan', 'inf')]
    header = ['layer', 'type', *(c[1] for c in shown), 'note']
    cells = [header]
    for row in rows:
        values = [getattr(row, c[0]) for c in shown]
        text = ['' if v is None else format(v, c[2]) for v, c in zip(values, shown)]
        cells.append([row.name, row.kind, *text, row.note])
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    lines = []
    for line in cells:
        left = '  '.join(c.ljust(w) for c, w in zip(line[:2], widths))
        right = '  '.join(c.rjust(w) for c, w in zip(line[2:-1], widths[2:]))
        lines.append(f'{left}  {right}  {line[-1]}'.rstrip())
    lines.insert(1, '-' * max(map(len, lines)))
    return '\n'.join(lines)


def standard_list(
    bench: Bench, recipe: Recipe, rows: List[sensitivity.Row], batches: List[Any], args: argparse.Namespace
) -> sensitivity.SkipList:
    """The shortest head of the ranking that is better off without SmoothQuant, as far as the budget asks.

    Taking SmoothQuant from a layer changes the weights before it, so each list is measured by calibrating
    anew, and lists double in length.
    """
    switch = sensitivity.Switch(bench.model)
    references = sensitivity.float_outputs(switch, bench.forward, batches)
    units = dict(lifecycle.units(bench.model))
    smoothed = [r.name for r in rows if isinstance(units[r.name], QuantWeightLayer)]
    smoothed = [n for n in smoothed if recipe.plan(n).smooth is not None]
    out = sensitivity.SkipList(budget=args.keep_output_error)
    best = float('inf')
    for length in sensitivity.doubling(min(args.max_skipped, len(smoothed))):
        names = smoothed[:length]
        if length:
            bench.prepare(treated(recipe, names, 'standard'), title=f'{length} layers standard')
        switch = sensitivity.Switch(bench.model)
        _, error = sensitivity.output_errors(
            switch, Replay(bench.model, bench.forward), batches, {}, switch.names, references
        )
        relative = float('inf') if error.relative_l1 is None else error.relative_l1
        out.lengths.append(length)
        out.errors.append(relative)
        if not error.nan and not error.inf and relative < best:
            best, out.names = relative, names
        if best <= out.budget:
            out.kept = True
            break
    return out


def treated(recipe: Recipe, names: List[str], treat: str) -> Recipe:
    """The recipe with the listed layers float, or quantized without SmoothQuant."""
    plain = recipe.to_dict()
    if treat == 'float':
        plain['skip'] = [*plain['skip'], *names]
    elif names:
        smooth = plain['smoothquant']
        smooth['overrides'] = [*(smooth.get('overrides') or []), {'layers': names, 'alpha': None}]
    return Recipe.from_dict(plain)


def pasted(recipe: Recipe, names: List[str], treat: str, framework: str) -> str:
    """The list as the config takes it, with what was in the recipe before."""
    if treat == 'float':
        return command.paste_list('skip', [*recipe.skip, *names], framework)
    if not names:
        return '# no layer is better off without SmoothQuant'
    listed = ', '.join(repr(n) for n in names)
    if framework == 'openpcdet':
        return f'SMOOTHQUANT: {{OVERRIDES: [{{LAYERS: [{listed}], ALPHA: null}}]}}'
    return f'smoothquant=dict(overrides=[dict(layers=[{listed}], alpha=None)]),'


def run(argv: Optional[List[str]] = None) -> int:
    """Measures, prints the table and writes the files."""
    args = parse(argv)
    command.set_threads(args)
    out = command.out_folder(args, 'sensitivity')
    seconds: Dict[str, float] = {}
    processor: Dict[str, float] = {}
    clock, used = time.perf_counter(), time.process_time()

    def lap(name: str) -> None:
        nonlocal clock, used
        now, now_used = time.perf_counter(), time.process_time()
        seconds[name], processor[name] = round(now - clock, 2), round(now_used - used, 2)
        clock, used = now, now_used

    bench = open_bench(args.config, args.checkpoint, command.options_of(args))
    recipe = chosen_recipe(bench.recipe, args, bench.quantized)
    spec = recipe.calibration
    split, seed = args.split or spec.split, spec.seed if args.seed is None else args.seed
    batches = list(bench.frames(split, args.frames, seed))
    lap('loading')
    came_bad = prepare(bench, recipe)
    lap('calibration')

    switch = sensitivity.Switch(bench.model)
    if not switch.names:
        raise Q3DError('nothing of the model is quantized: there is nothing to measure')
    reference = None
    if args.keep_map is not None:
        reference = float_map(bench, switch)
        lap('mAP of float')
    notes = {name: 'NaN or Inf came to it in calibration: left float' for name in came_bad}
    units = dict(lifecycle.units(bench.model))
    kinds = {name: unit.kind for name, unit in units.items() if name in switch.names or name in notes}
    variants = {name: [name] for name in switch.names}
    if args.group:
        variants = sensitivity.groups_of(switch.names, args.group)
        kinds = {name: f'{len(members)} layers' for name, members in variants.items()}
        notes = {}
    local = {} if args.group else sensitivity.local_errors(switch, bench.forward, batches)
    lap('own errors')
    alone, reverse, everything = {}, {}, None
    replay = Replay(bench.model, bench.forward)
    if not args.local:
        alone, _ = sensitivity.output_errors(switch, replay, batches, variants, progress='quantized alone')
        lap('effect on the outputs')
        if args.reverse:
            others = {n: set(switch.names).difference(members) for n, members in variants.items()}
            reverse, everything = sensitivity.output_errors(
                switch, replay, batches, others, switch.names, progress='all but one'
            )
            lap('all but one')
    rows = sensitivity.rows_of(kinds, local, alone, reverse, notes)
    text = table(rows)
    print(text)

    result: Dict[str, Any] = {
        'config': str(args.config),
        'checkpoint': str(args.checkpoint),
        'checkpoint_sha256': file_hash(Path(args.checkpoint)),
        'framework': bench.framework,
        'recipe': recipe.to_dict(),
        'frames': len(batches),
        'split': split,
        'seed': seed,
        'rows': [dataclasses.asdict(r) for r in rows],
        'all_quantized_relative_l1': None if everything is None else everything.relative_l1,
        'skip': None,
    }
    if not (args.local or args.group or args.no_skip_list):
        ranking = [r.name for r in rows if r.name in switch.names]
        if args.keep_map is not None:
            found = sensitivity.choose_by_metric(
                switch, lambda: bench.evaluate()['mAP'], reference, ranking, args.keep_map, args.max_skipped
            )
        elif args.treat == 'float':
            found = sensitivity.choose_skips(
                switch,
                replay,
                batches,
                ranking,
                args.keep_output_error,
                args.max_skipped,
                args.candidates,
                args.trial_frames,
            )
        else:
            found = standard_list(bench, recipe, rows, batches, args)
        lap('skip list')
        result['skip'] = {'treat': args.treat, **found.to_dict()}
        text += '\n\n' + verdict(found, args, pasted(recipe, found.names, args.treat, bench.framework))
        print(text[text.index('\n\n') + 1 :])
        files.write_bytes(
            out / 'skip.txt', (pasted(recipe, found.names, args.treat, bench.framework) + '\n').encode()
        )
        if args.treat == 'float':
            files.write_json(out / 'skip.json', [*recipe.skip, *found.names])
        if len(found.errors) > 1:
            files.write_bytes(
                out / 'skip.png', charts.skip_curve(found.lengths, found.errors, found.budget, found.measure)
            )
    result['seconds'], result['cpu_seconds'] = seconds, processor
    files.write_json(out / 'sensitivity.json', result)
    files.write_csv(out / 'sensitivity.csv', result['rows'])
    files.write_bytes(out / 'table.txt', (text + '\n').encode())
    files.write_bytes(out / 'sensitivity.png', charts.sensitivity_chart(result['rows']))
    laps = (f'{k} {v:.1f} ({processor[k]:.1f} of the processor)' for k, v in seconds.items())
    print('seconds: ' + ', '.join(laps))
    print(f'written to {out}')
    return 0


def verdict(found: sensitivity.SkipList, args: argparse.Namespace, paste: str) -> str:
    """What the list does, and the list."""
    word = {'float': 'left float', 'standard': 'without SmoothQuant'}[args.treat]
    # There is no error where all outputs are NaN.
    errors = ['none, all NaN or Inf' if e is None else f'{e:.5f}' for e in found.errors]
    line = f'{found.measure} with everything quantized: {errors[0]}\n'
    after = errors[found.lengths.index(len(found.names))]
    line += f'with {len(found.names)} layers {word}: {after}; budget {found.budget:g}: '
    if found.kept:
        return f'{line}kept\n\n{paste}'
    return f'{line}NOT kept (--max-skipped {args.max_skipped})\n\n{paste}'


def main(argv: Optional[List[str]] = None) -> int:
    """The command; returns its exit status."""
    return command.guarded(run, argv)


if __name__ == '__main__':
    sys.exit(main())
