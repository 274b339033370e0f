"""Ranks layers by what quantizing them costs, and proposes the ones to leave float.

    q3d sensitivity CONFIG CHECKPOINT [--frames N] [--keep-output-error 0.01] [--max-skipped 20]

Every layer is quantized alone and compared with float: its own output, and the raw outputs of the detector.
Then the shortest list of layers is looked for that, left float, brings the outputs within the budget with
everything else quantized. Results: table.txt, sensitivity.json, .csv and .png, skip.txt (to paste into the
config) and skip.json (for q3d sweep), in --out.
"""

import argparse
import dataclasses
import time
from typing import Any, Dict, List, Optional

from q3d_plugin import files
from q3d_plugin.analysis import charts, opening, proposals, sensitivity, skip_list
from q3d_plugin.analysis.calibrate import Calibrated, calibrate
from q3d_plugin.analysis.replay import Replay
from q3d_plugin.analysis.run_files import target_of
from q3d_plugin.analysis.skip_list import SkipList
from q3d_plugin.analysis.switch import Switch
from q3d_plugin.bench import Bench, file_hash
from q3d_plugin.commands import _common
from q3d_plugin.errors import Q3DError
from q3d_plugin.frame import read_frame
from q3d_plugin.recipe import Recipe

__all__ = ['main']

# Frames of calibration that tell which layers are worse than others; that of a full-size detector with 300
# frames takes longer than everything here.
ENOUGH = 32


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The arguments."""
    parser = _common.parser_of('sensitivity', __doc__)
    _common.add_common(parser, 'sensitivity')
    _common.add_frame(parser)
    parser.add_argument('--frames', type=int, default=4, help='frames to measure on (default: 4)')
    parser.add_argument('--split', choices=('train', 'val', 'test'), help="default: the recipe's calibration")
    parser.add_argument('--seed', type=int, help="chooses the frames (default: the recipe's)")
    parser.add_argument(
        '--calibration-frames',
        type=int,
        help=f"frames that ranges are taken from (default: the recipe's, at most {ENOUGH} or --frames)",
    )
    parser.add_argument('--bits', type=int, nargs=2, metavar=('W', 'A'), help="in place of the recipe's")
    parser.add_argument('--target', help="in place of the recipe's, such as simulation for other widths")
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
    _common.at_least(args, 1, 'frames', 'calibration_frames', 'max_skipped', 'candidates', 'trial_frames')
    _common.at_least(args, 0, 'keep_output_error', 'keep_map', 'seed')
    if args.frame and (args.keep_map is not None or args.split):
        raise Q3DError(
            '--frame: it takes the place of the data set, so it does not go with --keep-map or --split'
        )
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
    if args.target:
        plain['target'] = args.target
    # A quantized checkpoint has ranges, and is known by its recipe.
    most = recipe.calibration.frames if quantized else max(ENOUGH, args.frames)
    frames = args.calibration_frames or min(recipe.calibration.frames, most)
    if args.frame:
        frames = 1
    elif frames < recipe.calibration.frames:
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


def ranges(bench: Bench, recipe: Recipe) -> Calibrated:
    """Gives the model ranges, unless the checkpoint has them."""
    if not bench.quantized:
        return calibrate(bench, recipe)
    if recipe != bench.recipe:
        raise Q3DError(f'checkpoint {str(bench.checkpoint)!r} is quantized already: give the float one')
    return Calibrated()


def float_map(bench: Bench, switch: Switch) -> float:
    """mAP of the float model, by the framework's own evaluation."""
    with switch.restored():
        switch.only(())
        found = bench.evaluate()['mAP']
    if found is None:
        raise Q3DError("--keep-map: this data set's metric has no mAP; --keep-output-error would work")
    return found


class Laps:
    """Seconds, by the clock and of the processor, of the parts of a command."""

    def __init__(self) -> None:
        self.seconds: Dict[str, float] = {}
        self.processor: Dict[str, float] = {}
        self._clock, self._used = time.perf_counter(), time.process_time()

    def __call__(self, name: str) -> None:
        """Ends a part."""
        clock, used = time.perf_counter(), time.process_time()
        self.seconds[name], self.processor[name] = round(clock - self._clock, 2), round(used - self._used, 2)
        self._clock, self._used = clock, used

    def __str__(self) -> str:
        return ', '.join(
            f'{k} {v:.1f} ({self.processor[k]:.1f} of the processor)' for k, v in self.seconds.items()
        )


def run(argv: Optional[List[str]] = None) -> int:
    """Measures, prints the table and writes the files."""
    args = parse(argv)
    _common.set_threads(args)
    out = _common.out_folder(args, 'sensitivity')
    lap = Laps()
    bench = opening.open_bench(args.config, args.checkpoint, _common.options_of(args))
    recipe = chosen_recipe(bench.recipe, args, bench.quantized)
    spec = recipe.calibration
    split, seed = args.split or spec.split, spec.seed if args.seed is None else args.seed
    if args.frame:
        bench.use_frame(read_frame(args.frame))
        split = None
    batches = list(bench.frames(split, args.frames, seed))
    lap('loading')
    calibrated = ranges(bench, recipe)
    lap('calibration')
    switch = Switch(bench.model)
    if not switch.names:
        raise Q3DError(
            'nothing of the model is quantized: there is nothing to measure'
            + (f'. {calibrated.warning()}' if calibrated.nonfinite else '')
        )
    reference = None
    if args.keep_map is not None:
        reference = float_map(bench, switch)
        lap('mAP of float')
    rows, everything = sensitivity.measure(
        bench, switch, batches, calibrated.notes(), args.group, args.local, args.reverse, lap
    )
    target = target_of(recipe.to_dict())
    text = f'target {target}, frames measured on: {len(batches)} '
    text += (f'of the {split} split' if split else 'that was given, which also gave the ranges') + '\n\n'
    if not args.local and proposals.has_proposals(bench.forward(batches[0])):
        text += f'{proposals.WORDS}\n\n'
    text += sensitivity.table(rows)
    if calibrated.nonfinite:
        text += f'\n\n{calibrated.warning()}'
    print(text)

    result: Dict[str, Any] = {
        'config': str(args.config),
        'checkpoint': str(args.checkpoint),
        'checkpoint_sha256': file_hash(bench.checkpoint),
        'framework': bench.framework,
        'recipe': recipe.to_dict(),
        'frames': len(batches),
        'split': split,
        'seed': seed,
        'rows': [dataclasses.asdict(r) for r in rows],
        'all_quantized_relative_l1': None if everything is None else everything.relative_l1,
        'left_float': list(calibrated.left_float),
        'skip': None,
    }
    if not (args.local or args.group or args.no_skip_list):
        ranking = [r.name for r in rows if r.name in switch.names]
        found = listed(bench, recipe, switch, ranking, batches, args, reference)
        lap('skip list')
        result['skip'] = {'treat': args.treat, **found.to_dict()}
        # What has no range because of NaN was float in every measurement, so it is in the list.
        names = [*calibrated.left_float, *found.names] if args.treat == 'float' else found.names
        pasted = skip_list.paste(recipe, names, args.treat, bench.framework)
        words = f'{skip_list.verdict(found, args.treat, args.max_skipped)}\n\n{pasted}'
        print(f'\n{words}')
        text += f'\n\n{words}'
        files.write_text(out / 'skip.txt', pasted)
        if args.treat == 'float':
            files.write_json(out / 'skip.json', [*recipe.skip, *names])
        if len(found.errors) > 1:
            drawn = charts.skip_curve(found.lengths, found.errors, found.budget, found.measure)
            files.write_bytes(out / 'skip.png', drawn)
    result['seconds'], result['cpu_seconds'] = lap.seconds, lap.processor
    files.write_json(out / 'sensitivity.json', result)
    files.write_csv(out / 'sensitivity.csv', result['rows'])
    files.write_text(out / 'table.txt', text)
    files.write_bytes(
        out / 'sensitivity.png', charts.sensitivity_chart(result['rows'], title=f'target {target}')
    )
    print(f'seconds: {lap}')
    print(f'written to {out}')
    return 0


def listed(
    bench: Bench,
    recipe: Recipe,
    switch: Switch,
    ranking: List[str],
    batches: List[Any],
    args: argparse.Namespace,
    reference: Optional[float],
) -> SkipList:
    """The list that the arguments ask for."""
    if args.keep_map is not None:
        return skip_list.choose_by_metric(
            switch, lambda: bench.evaluate()['mAP'], reference, ranking, args.keep_map, args.max_skipped
        )
    budget, most = args.keep_output_error, args.max_skipped
    if args.treat == 'standard':
        return skip_list.choose_unsmoothed(bench, recipe, ranking, batches, budget, most)
    replay = Replay(bench.model, bench.forward)
    return skip_list.choose_skips(
        switch, replay, batches, ranking, budget, most, args.candidates, args.trial_frames
    )


main = _common.as_command(run)
