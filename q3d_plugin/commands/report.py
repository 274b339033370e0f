"""Makes one self-contained HTML page of a run; an unfinished run shows what there is.

    q3d report RUN_DIR [--float FLOAT_RUN_DIR] [--sensitivity DIR] [--sweep DIR] [--out PAGE.html]

RUN_DIR is the work dir of q3d test, or the folder of one run in it.
"""

from pathlib import Path
from typing import List, Optional

from q3d_plugin import files
from q3d_plugin.analysis import report
from q3d_plugin.analysis.run_files import find_run
from q3d_plugin.commands import _common

__all__ = ['main']


def run(argv: Optional[List[str]] = None) -> int:
    """Writes the page."""
    parser = _common.parser_of('report', __doc__)
    parser.add_argument('run_dir', type=Path, help='folder that q3d test wrote to')
    parser.add_argument('--float', type=Path, dest='float_run', help='folder of the run of the float model')
    parser.add_argument('--sensitivity', type=Path, help='folder that q3d sensitivity wrote to')
    parser.add_argument('--sweep', type=Path, help='folder that q3d sweep wrote to')
    parser.add_argument('--data-root', help="folder of nuScenes (default: the run's own)")
    parser.add_argument('--version', help="of nuScenes (default: the run's own)")
    parser.add_argument('--out', type=Path, help='the page (default: RUN_DIR/report.html)')
    args = parser.parse_args(argv)
    found = find_run(args.run_dir, args.float_run, args.sensitivity, args.sweep)
    folder = args.run_dir if args.run_dir.is_dir() else args.run_dir.parent
    out = args.out or folder / 'report.html'
    files.check_writable(out.parent)
    files.write_text(out, report.build(found, args.data_root, args.version))
    print(f'written to {out}')
    return 0


main = _common.as_command(run)
