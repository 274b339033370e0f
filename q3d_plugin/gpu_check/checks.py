"""What the parts do; each gives a :class:`Result`."""

import json
import os
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from q3d_plugin import files
from q3d_plugin.gpu_check.install import install, interpreter_of
from q3d_plugin.gpu_check.machine import GPU
from q3d_plugin.text import text_table

__all__ = [
    'FAILED',
    'PASSED',
    'SKIPPED',
    'Result',
    'Settings',
    'benchmark',
    'compare_demo',
    'count_tests',
    'demo',
    'kernels',
    'openpcdet',
    'setup',
    'tests',
]

PASSED, FAILED, SKIPPED = 'passed', 'failed', 'skipped'

MAP_TOLERANCE = 0.001
"""A tenth of a point of mAP."""


class Settings(NamedTuple):
    """What all parts are given.

    Attributes:
        root: The repository.
        out: Folder of the results.
        wheels: What ``--collect`` filled; None where there is a network.
        cpu_summary: Files with the mAP of the demos on a CPU; empty where there is nothing to compare with.
        gpu: The first GPU.
        facts: Versions of Python, torch and its CUDA.
    """

    root: Path
    out: Path
    wheels: Optional[Path]
    cpu_summary: Sequence[Path]
    gpu: GPU
    facts: Dict[str, Any]


class Result(NamedTuple):
    """What a part found.

    Attributes:
        status: :data:`PASSED`, :data:`FAILED` or :data:`SKIPPED`.
        summary: One line.
        lines: Tables and what else is printed.
        data: What is kept in the report, plain data.
    """

    status: str
    summary: str = ''
    lines: Sequence[str] = ()
    data: Mapping[str, Any] = {}


def _run(settings: Settings, words: Sequence[str], log: str) -> Tuple[int, str]:
    """Runs the environment's interpreter in the repository; returns its exit status and the end of its
    output."""
    path = settings.out / 'logs' / log
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w') as f:
        command = [str(interpreter_of(settings.out)), *words]
        code = subprocess.run(command, stdout=f, stderr=subprocess.STDOUT, cwd=settings.root).returncode
    return code, '\n'.join(path.read_text(errors='replace').splitlines()[-40:])


def setup(settings: Settings) -> Result:
    """The part ``setup``: installs what is missing beside torch."""
    notes, versions = install(
        settings.root, settings.out, settings.wheels, settings.facts, settings.gpu.capability
    )
    names = ('torch', 'mmcv', 'mmdet', 'mmdet3d', 'mmengine', 'numpy', 'pytorch-quantization')
    shown = {n: v for n, v in versions.items() if n in names or n.startswith(('spconv', 'cumm'))}
    words = ', '.join(f'{name} {version}' for name, version in sorted(shown.items()))
    # A package that is missing has the parts skipped that need it; the others still say something.
    return Result(
        PASSED, words, [f'not installed: {note}' for note in notes], {'versions': shown, 'notes': notes}
    )


def count_tests(path: Path) -> Dict[str, int]:
    """Numbers of tests in a JUnit file of pytest: ``passed``, ``failed`` and ``skipped``."""
    suites = ElementTree.parse(path).getroot().iter('testsuite')
    found = {'tests': 0, 'failed': 0, 'skipped': 0}
    for suite in suites:
        found['tests'] += int(suite.get('tests', 0))
        found['skipped'] += int(suite.get('skipped', 0))
        found['failed'] += int(suite.get('failures', 0)) + int(suite.get('errors', 0))
    return {'passed': found['tests'] - found['failed'] - found['skipped'], **found}


def tests(settings: Settings) -> Result:
    """The part ``tests``: those marked ``gpu``."""
    junit = settings.out / 'tests.xml'
    junit.unlink(missing_ok=True)
    words = ['-m', 'pytest', '-q', '-m', 'gpu', 'tests/gpu', '-p', 'no:cacheprovider', f'--junitxml={junit}']
    code, end = _run(settings, words, 'tests.log')
    if not junit.is_file():
        return Result(FAILED, f'pytest ended with {code}', end.splitlines())
    counts = count_tests(junit)
    words = f'{counts["passed"]} passed, {counts["failed"]} failed, {counts["skipped"]} skipped'
    good = code == 0 and counts['passed'] > 0
    return Result(PASSED if good else FAILED, words, [] if good else end.splitlines(), counts)


def kernels(settings: Settings) -> Result:
    """The part ``kernels``: fake quantization alone, against the chain of operations and against the peer."""
    return _measured(settings, ['-m', 'q3d_plugin.gpu_check.kernels'], 'kernels')


def _measured(settings: Settings, words: Sequence[str], name: str) -> Result:
    """Runs a measurement that writes rows with ``passed`` to the file that its last word names."""
    path = settings.out / f'{name}.json'
    path.unlink(missing_ok=True)
    code, end = _run(settings, [*words, str(path)], f'{name}.log')
    if not path.is_file():
        return Result(FAILED, f'it ended with {code}', end.splitlines())
    content = json.loads(path.read_text())
    missed = [row['name'] for row in content['rows'] if row.get('passed') is False]
    text = (settings.out / 'logs' / f'{name}.log').read_text(errors='replace').splitlines()
    summary = f'missed: {", ".join(missed)}' if missed else 'every target is met'
    return Result(FAILED if missed or code else PASSED, summary, text[-60:], content)


def compare_demo(found: Mapping[str, Any], cpu: Mapping[str, Any]) -> Tuple[List[List[str]], List[str]]:
    """mAP of the demo on both devices.

    Args:
        found: ``summary.json`` of this machine.
        cpu: That of a CPU.

    Returns:
        tuple: Rows of a table, and the models that differ by more than :data:`MAP_TOLERANCE`.
    """
    rows, apart = [], []
    for name, here in found.items():
        there = cpu.get(name)
        if not (isinstance(here, dict) and isinstance(there, dict) and 'mAP' in here):
            continue
        difference = here['mAP'] - there['mAP']
        if not abs(difference) <= MAP_TOLERANCE:
            apart.append(name)
        rows.append([name, f'{here["mAP"]:.4f}', f'{there["mAP"]:.4f}', f'{difference:+.4f}'])
    return rows, apart


def _compared(settings: Settings, found: Mapping[str, Any]) -> Result:
    """The result of a demo: its mAP against that of the CPU."""
    if not settings.cpu_summary:
        return Result(PASSED, 'not compared: --cpu-summary was not given', data={'found': found})
    cpu: Dict[str, Any] = {}
    for path in settings.cpu_summary:
        cpu.update(files.read_json(path, '--cpu-summary'))
    rows, apart = compare_demo(found, cpu)
    table = text_table(['model', 'mAP', 'on the CPU', ''], rows, right=[1, 2, 3])
    good = bool(rows) and not apart
    words = (
        'mAP is within 0.1 points of the CPU' if good else f'mAP differs: {", ".join(apart) or "no model"}'
    )
    return Result(PASSED if good else FAILED, words, table.splitlines(), {'found': found, 'rows': rows})


def demo(settings: Settings) -> Result:
    """The part ``demo``: the toy data set by MMDetection3D's own evaluation."""
    out = settings.out / 'demo'
    words = ['-m', 'q3d_plugin', 'demo', '--data', str(out / 'data'), '--out', str(out)]
    code, end = _run(settings, words, 'demo.log')
    if code:
        return Result(FAILED, f'it ended with {code}', end.splitlines())
    return _compared(settings, files.read_json(out / 'summary.json', 'summary of the demo'))


def openpcdet(settings: Settings) -> Result:
    """The part ``openpcdet``: the toy data set by OpenPCDet's own evaluation, where a checkout is at hand."""
    if not os.environ.get('OPENPCDET_ROOT'):
        return Result(SKIPPED, 'needs OPENPCDET_ROOT, a checkout of OpenPCDet that is built for this GPU')
    out = settings.out / 'openpcdet'
    data, summary = str(out / 'data'), str(out / 'summary.json')
    made = ['-m', 'q3d_plugin', 'toy-data', '--out', data, '--infos', 'openpcdet']
    code, end = _run(settings, made, 'openpcdet-data.log')
    if not code:
        words = ['-m', 'q3d_plugin.gpu_check.openpcdet_demo', data, summary]
        code, end = _run(settings, words, 'openpcdet.log')
    if code:
        return Result(FAILED, f'it ended with {code}', end.splitlines())
    return _compared(settings, files.read_json(out / 'summary.json', 'summary of OpenPCDet'))


def benchmark(settings: Settings) -> Result:
    """The part ``benchmark``: full-size CenterPoint, quantized against float."""
    words = ['-m', 'q3d_plugin', 'benchmark', '--repeats', '10', '--out']
    return _measured(settings, words, 'benchmark')
