"""The parts of the check by name, what each needs, and the results that are kept between runs."""

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from q3d_plugin import files
from q3d_plugin.gpu_check import checks, report
from q3d_plugin.gpu_check.checks import FAILED, SKIPPED, Result, Settings
from q3d_plugin.gpu_check.install import interpreter_of

__all__ = ['PARTS', 'Part', 'Settings', 'missing_modules', 'run_part', 'run_parts']


class Part(NamedTuple):
    """A part of the check.

    Attributes:
        run: Does it.
        needs: The modules that have to be there; where one is missing, the part is skipped with one line.
    """

    run: Callable[[Settings], Result]
    needs: Tuple[str, ...] = ()


_MMDET3D = ('mmcv._ext', 'mmdet', 'mmdet3d', 'spconv.pytorch', 'nuscenes')

PARTS: Dict[str, Part] = {
    'setup': Part(checks.setup),
    'tests': Part(checks.tests, ('pytest', 'pytorch_quantization', 'q3d_plugin')),
    'kernels': Part(checks.kernels, ('pytorch_quantization',)),
    'demo': Part(checks.demo, (*_MMDET3D, 'matplotlib', 'pyquaternion')),
    'openpcdet': Part(checks.openpcdet, ('spconv.pytorch', 'easydict', 'nuscenes')),
    'benchmark': Part(checks.benchmark, _MMDET3D),
    'report': Part(report.report),
}


def missing_modules(python: Path, modules: Sequence[str]) -> List[str]:
    """Those of these modules that an interpreter cannot import.

    Args:
        python: The interpreter.
        modules: Names; each is imported in a process of its own, so that one which ends it harms no other.
    """
    command = [str(python), '-c']
    return [
        name
        for name in modules
        if subprocess.run([*command, f'import {name}'], capture_output=True, check=False).returncode
    ]


def run_part(name: str, settings: Settings, missing: Optional[Callable[..., List[str]]] = None) -> Result:
    """Runs one part and keeps its result in the folder of the results.

    Args:
        name: Of the part.
        settings: Where, and with what.
        missing: In place of :func:`missing_modules`, for tests.
    """
    part, start = PARTS[name], time.time()
    lacks = (missing or missing_modules)(interpreter_of(settings.out), part.needs)
    if lacks:
        result = Result(SKIPPED, f'needs {", ".join(lacks)}, which cannot be imported')
    else:
        result = part.run(settings)
    content: Dict[str, Any] = {**result._asdict(), 'part': name, 'seconds': round(time.time() - start, 1)}
    if name != 'report':
        files.write_json(settings.out / 'results' / f'{name}.json', content)
    return result


def run_parts(names: Sequence[str], settings: Settings) -> int:
    """Runs parts in their order, a line each; returns the exit status: 1 where one failed."""
    worst = 0
    for name in (n for n in PARTS if n in names):
        print(f'== {name}', flush=True)  # noqa: T201
        result = run_part(name, settings)
        words = f'{result.status}: {result.summary}' if result.summary else result.status
        print('\n'.join([*result.lines, f'{name}: {words}']), flush=True)  # noqa: T201
        worst = max(worst, result.status == FAILED)
    return int(worst)
