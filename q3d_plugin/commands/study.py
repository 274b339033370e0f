"""The results of tools/study.sh as one table: all recipes in both frameworks, beside the study's own figures.

    python tools/study_table.py MMDetection3D=work_dirs/study/mmdet3d OpenPCDet=work_dirs/study/openpcdet

Prints Markdown, and writes it with the plain figures into the folder of the first one: study.md, study.json.
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
from typing import Dict, List, Optional, Tuple  # noqa: E402

from q3d_plugin import files  # noqa: E402
from q3d_plugin.errors import Q3DError  # noqa: E402

# The study's own figures on nuScenes (OpenPCDet, cbgs_voxel0075_res3d_centerpoint, 8 bits), not measured
# here; where it gives a range, the middle of it.
NUSCENES: Dict[str, Tuple[float, Optional[float]]] = {
    'float': (0.5922, 0.6648),
    'dense W8A8, signed': (0.5793, 0.6491),
    'dense W8A8, unsigned': (0.5885, 0.6603),
    'dense W8A8, SmoothQuant 0.5 on all': (0.0332, 0.1086),
    'dense W8A8, SmoothQuant 0.5 on the backbone, head plain': (0.5889, 0.6607),
    'head W8A8, backbone float': (0.5891, 0.6607),
    'backbone W8A8, head float': (0.5912, 0.6630),
    'dense W8A8, SmoothQuant 0.5 on the head but the listed layers': (0.5881, None),
    'dense W8A8, SmoothQuant 0.5 on all but the listed layers': (0.5889, None),
}


def results_of(folder: Path) -> Dict[str, Dict[str, float]]:
    """mAP and NDS of every finished recipe of a sweep, and of ``float``.

    Args:
        folder: Where ``tools/sweep.py`` wrote.

    Raises:
        Q3DError: There is no sweep with mAP.
    """
    content = files.read_json(folder / 'sweep.json', str(folder))
    entries = [('float', content.get('float')), *((e['name'], e.get('result')) for e in content['entries'])]
    out = {n: {k: r.get(k) for k in ('mAP', 'NDS')} for n, r in entries if r and r.get('mAP') is not None}
    if not out:
        raise Q3DError(f'{folder}: it has no result with mAP yet; run tools/sweep.py with --metric map')
    return out


def table(found: Dict[str, Dict[str, Dict[str, float]]]) -> str:
    """A Markdown table: a line for each recipe, two columns for each framework, two for the study."""

    def cell(value: Optional[float]) -> str:
        return '' if value is None else f'{100 * value:.2f}'

    columns = [*found, 'the study, nuScenes (theirs)']
    header = ['recipe'] + [f'{c}: {m}' for c in columns for m in ('mAP', 'NDS')]
    lines = [header, ['---'] * len(header)]
    names = dict.fromkeys(name for results in found.values() for name in results)
    for name in names:
        line = [name]
        for results in found.values():
            result = results.get(name, {})
            line += [cell(result.get('mAP')), cell(result.get('NDS'))]
        lines.append(line + [cell(v) for v in NUSCENES.get(name, (None, None))])
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('results', nargs='+', metavar='TITLE=FOLDER')
    args = parser.parse_args(argv)
    try:
        found, first = {}, None
        for item in args.results:
            title, equals, folder = item.partition('=')
            if not equals or not title:
                raise Q3DError(f'{item!r} was given; TITLE=FOLDER would work')
            found[title], first = results_of(Path(folder)), first or Path(folder)
        text = table(found)
        files.write_bytes(first / 'study.md', (text + '\n').encode())
        files.write_json(first / 'study.json', {**found, 'study (theirs)': NUSCENES})
        print(text)
    except Q3DError as error:
        print(f'study_table: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
