"""Builds every detector config of both frameworks, quantized too, and compares it with float when off.

    q3d zoo --mmdet3d [CONFIG_DIR] --openpcdet [ROOT] [--only PATTERN] [--out zoo.json] [--resume]

Each config is built in float and once more with the Quant types put in mechanically. Both get the same random
weights (BatchNorm statistics included, so that folding is really tested). Where the float model runs on the
CPU on a synthetic frame, every layer of the quantized model with all quantizers off is compared with the
float layer (with its BatchNorm, where that was folded). With --int8 the model is then calibrated on the frame
and runs in INT8. Each config has a process of its own, with a limit of time and memory.
"""

import argparse
from pathlib import Path
from typing import List, Optional

from q3d_plugin.commands._common import as_command
from q3d_plugin.errors import Q3DError
from q3d_plugin.files import check_writable
from q3d_plugin.frameworks import open_adapter
from q3d_plugin.zoo.rows import failures, read_rows, write_rows
from q3d_plugin.zoo.survey import Limits, chosen, survey
from q3d_plugin.zoo.tables import outcome, table

__all__ = ['main']

OUT = 'work_dirs/zoo/zoo.json'


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog='q3d zoo',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        '--mmdet3d', nargs='?', const='', metavar='CONFIG_DIR', help='its configs; the wheel has some'
    )
    parser.add_argument('--openpcdet', nargs='?', const='', metavar='ROOT', help='a checkout of OpenPCDet')
    parser.add_argument('--only', nargs='+', default=['*'], help='patterns of configs, such as second/*')
    parser.add_argument(
        '--forward', action=argparse.BooleanOptionalAction, default=True, help='run the models'
    )
    parser.add_argument('--int8', action='store_true', help='calibrate on the frame and run in INT8, too')
    parser.add_argument('--timeout', type=float, default=900, help='seconds for one config')
    parser.add_argument('--memory', type=float, default=6, help='GiB for one config')
    parser.add_argument('--out', default=OUT, help='where the result is written, as JSON')
    parser.add_argument('--resume', action='store_true', help='go on with what --out has already')
    return parser.parse_args(argv)


def run(argv: Optional[List[str]]) -> int:
    """Examines the configs, prints the table and writes the file.

    Raises:
        Q3DError: There is nothing to examine, or a file or folder that is named does not work.
    """
    args = parse(argv)
    places = {name: getattr(args, name) for name in ('mmdet3d', 'openpcdet')}
    places = {name: place or None for name, place in places.items() if place is not None}
    if not places:
        raise Q3DError('nothing to look at: give --mmdet3d, --openpcdet ROOT, or both')
    out = Path(args.out)
    check_writable(out.parent)
    work = chosen([open_adapter(name, place) for name, place in places.items()], args.only)
    rows = read_rows(args.out) if args.resume and out.is_file() else []
    limits = Limits(args.forward, args.int8, args.timeout, args.memory)
    for number, row in survey(work, rows, limits):
        rows.append(row)
        write_rows(args.out, rows)
        state = row.float_build and f'float does not build: {row.float_build}' or outcome(row)
        print(f'[{number + 1}/{len(work)}] {row.config}: {state} ({row.seconds:.0f} s)', flush=True)
    print(table(rows))
    for row in failures(rows):
        print(f'\n{row.config}: off - float {row.difference} at {row.worst}\n{row.ours}')
    return int(bool(failures(rows)))


main = as_command(run)
