"""All results of a check as a table, as JSON, and as one page to keep."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Dict, List

from q3d_plugin import files
from q3d_plugin.gpu_check.checks import PASSED, SKIPPED, Result, Settings
from q3d_plugin.text import markdown_table, text_table

__all__ = ['page', 'report', 'rows_of']

HEADER = ['part', '', '', 'seconds']


def _results(settings: Settings) -> List[Dict[str, Any]]:
    folder = settings.out / 'results'
    found = sorted(folder.glob('*.json'), key=lambda p: p.stat().st_mtime)
    return [files.read_json(path, 'result') for path in found]


def rows_of(results: Sequence[Mapping[str, Any]]) -> List[List[Any]]:
    """A line for each part: name, status, summary, seconds."""
    return [[r['part'], r['status'], r['summary'], r['seconds']] for r in results]


def _machine(settings: Settings) -> Dict[str, Any]:
    gpu, facts = settings.gpu, settings.facts
    return {
        'GPU': f'{gpu.name}, compute capability {gpu.capability}, {gpu.memory}',
        'driver': gpu.driver,
        'torch': f'{facts["torch"]}, CUDA {facts["cuda"]}',
        'Python': facts['python'],
    }


def page(machine: Mapping[str, Any], results: Sequence[Mapping[str, Any]], date: str) -> str:
    """The page in Markdown.

    Args:
        machine: GPU, driver and versions by their names.
        results: Of the parts.
        date: When the page was made.
    """
    versions = next((r['data'].get('versions', {}) for r in results if r['part'] == 'setup'), {})
    facts = {**machine, **versions}
    lines = [f'# Check on {machine["GPU"]}', '', f'Made on {date}.', '']
    lines += [markdown_table(['', ''], facts.items()), '', markdown_table(HEADER, rows_of(results))]
    for result in results:
        if result['lines']:
            lines += ['', f'## {result["part"]}', '', '```text', *result['lines'], '```']
    return '\n'.join(lines)


def report(settings: Settings) -> Result:
    """The part ``report``: writes ``report.md`` and ``report.json`` from the results of all runs."""
    results = _results(settings)
    if not results:
        return Result(SKIPPED, f'no part has run yet in {settings.out}')
    machine = _machine(settings)
    date = time.strftime('%Y-%m-%d')
    files.write_json(settings.out / 'report.json', {'date': date, 'machine': machine, 'results': results})
    files.write_text(settings.out / 'report.md', page(machine, results, date))
    table = text_table(HEADER, rows_of(results), right=[3])
    # Each part has counted its own failure; a report of failures is a good report.
    return Result(PASSED, f'written to {settings.out / "report.md"}', table.splitlines())
