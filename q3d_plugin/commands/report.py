"""One self-contained HTML page of a run of tools/test.py; an unfinished run shows what there is.

python tools/report.py RUN_DIR [--float FLOAT_RUN_DIR] [--sensitivity DIR] [--sweep DIR] [--out PAGE.html]
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
if __name__ == '__main__':
    # Python puts this folder first on the path, where its scripts would shadow modules of the standard
    # library (profile.py, for example).
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or '.') != HERE]

import argparse  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import List, Optional  # noqa: E402

from q3d_plugin import files  # noqa: E402
from q3d_plugin.analysis import command, report  # noqa: E402
from q3d_plugin.files import check_writable  # noqa: E402


def run(argv: Optional[List[str]] = None) -> int:
    """Writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('run_dir', type=Path, help='folder that tools/test.py wrote to')
    parser.add_argument('--float', type=Path, dest='float_run', help='folder of the run of the float model')
    parser.add_argument('--sensitivity', type=Path, help='folder that tools/sensitivity.py wrote to')
    parser.add_argument('--sweep', type=Path, help='folder that tools/sweep.py wrote to')
    parser.add_argument('--data-root', help="folder of nuScenes (default: the run's own)")
    parser.add_argument('--version', help="of nuScenes (default: the run's own)")
    parser.add_argument('--out', type=Path, help='the page (default: RUN_DIR/report.html)')
    args = parser.parse_args(argv)
    found = report.find_run(args.run_dir, args.float_run, args.sensitivity, args.sweep)
    folder = args.run_dir if args.run_dir.is_dir() else args.run_dir.parent
    out = args.out or folder / 'report.html'
    check_writable(out.parent)
    files.write_bytes(out, report.build(found, args.data_root, args.version).encode())
    print(f'written to {out}')
    return 0


def main(argv: Optional[List[str]] = None) -> int:
    """The command; returns its exit status."""
    return command.guarded(run, argv)


if __name__ == '__main__':
    sys.exit(main())
