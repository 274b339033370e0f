"""Runs the study's experiments one after the other, and makes one table of them.

    q3d study                               on the toy nuScenes (about an hour a framework)
    q3d study CONFIG CHECKPOINT [options]   on your own detector and data: options are those of q3d sweep
    q3d study --table MMDetection3D=work_dirs/study/mmdet3d OpenPCDet=work_dirs/study/openpcdet

On the toy, OpenPCDet's part runs where it is installed or OPENPCDET_ROOT names a checkout. What was
interrupted goes on where it stopped. The table is printed as Markdown, beside the study's own figures, and
written with the plain figures into the folder of the first sweep: study.md, study.json.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

import q3d_plugin
from q3d_plugin import files
from q3d_plugin.analysis import study
from q3d_plugin.commands import _common
from q3d_plugin.errors import Q3DError
from q3d_plugin.shipped import configs_folder

__all__ = ['main']

DATA, RESULTS = Path('data/toy_nuscenes'), Path('work_dirs/study')
TITLES = {'mmdet3d': 'MMDetection3D', 'openpcdet': 'OpenPCDet'}


class Sweep(NamedTuple):
    """The experiments with one detector: title of its columns, folder of results, arguments of q3d sweep."""

    title: str
    folder: Path
    arguments: List[str]


def sweep_of(config: str, checkpoint: str, out: Optional[Path], options: List[str]) -> Sweep:
    """The experiments with the detector of a config."""
    framework = 'mmdet3d' if config.endswith('.py') else 'openpcdet'
    folder = out or RESULTS / Path(config).stem
    recipes = configs_folder() / framework / 'study' / 'recipes.py'
    given = [config, checkpoint, '--grid', str(recipes), '--out', str(folder), *options]
    return Sweep(framework, folder, given)


def toy_sweep_of(framework: str) -> Sweep:
    """The experiments with the toy detector of a framework."""
    configs, suffix = configs_folder() / framework, {'mmdet3d': 'py', 'openpcdet': 'yaml'}[framework]
    name, folder = 'toy_centerpoint_voxel', RESULTS / framework
    given = [str(configs / f'{name}_w8a8.{suffix}'), str(configs / f'{name}.pth')]
    given += ['--grid', str(configs / 'study' / 'recipes.py'), '--out', str(folder)]
    if framework == 'openpcdet':
        given += ['--set', f'DATA_CONFIG.DATA_PATH={DATA.absolute()}']
    return Sweep(TITLES[framework], folder, given)


def q3d(name: str, *arguments: str) -> int:
    """Runs a command in a process of its own, as each framework wants one; returns its exit status."""
    paths = [str(Path(q3d_plugin.__file__).resolve().parents[1]), os.environ.get('PYTHONPATH', '')]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths))}
    command = [sys.executable, '-m', 'q3d_plugin', name, *arguments]
    return subprocess.run(command, env=environment, check=False).returncode


def tabulate(folders: Dict[str, Path]) -> None:
    """Prints the table of some sweeps and writes it beside the first of them."""
    found = {title: study.results_of(folder) for title, folder in folders.items()}
    first, text = next(iter(folders.values())), study.table(found)
    files.write_text(first / 'study.md', text)
    files.write_json(first / 'study.json', {**found, 'study (theirs)': study.NUSCENES})
    print(text)


def run(argv: Optional[List[str]] = None) -> int:
    """Runs the sweeps and makes the table."""
    parser = _common.parser_of('study', __doc__)
    parser.add_argument('config', nargs='?', help='of a CenterPoint with Quant types (default: the toys)')
    parser.add_argument('checkpoint', nargs='?', help='of the float model')
    parser.add_argument(
        '--out', type=Path, help='folder for the results (default: work_dirs/study/NAME OF THE CONFIG)'
    )
    parser.add_argument('--table', nargs='+', metavar='TITLE=FOLDER', help='only the table, of these sweeps')
    args, options = parser.parse_known_args(argv)
    if args.table:
        folders = {}
        for item in args.table:
            title, equals, folder = item.partition('=')
            if not equals or not title:
                raise Q3DError(f'--table: {item!r} was given; TITLE=FOLDER would work')
            folders[title] = Path(folder)
        tabulate(folders)
        return 0
    if args.config:
        if not args.checkpoint:
            raise Q3DError('study: a config was given and no checkpoint; both, or neither, would work')
        sweeps = [sweep_of(args.config, args.checkpoint, args.out, options)]
    else:
        if options or args.out:
            option = options[0] if options else '--out'
            raise Q3DError(f'study: {option} was given; options go with a config and a checkpoint')
        from q3d_plugin.commands.toy_data import frameworks_at_hand

        frameworks = frameworks_at_hand()
        if not frameworks:
            raise Q3DError('study: neither MMDetection3D nor OpenPCDet is here (OPENPCDET_ROOT is not set)')
        status = q3d('toy-data', '--out', str(DATA), '--infos', *frameworks)
        if status:
            return status
        sweeps = [toy_sweep_of(framework) for framework in frameworks]
    for sweep in sweeps:
        # What was wrong the command has told.
        status = q3d('sweep', *sweep.arguments)
        if status:
            return status
    tabulate({sweep.title: sweep.folder for sweep in sweeps})
    return 0


main = _common.as_command(run)
