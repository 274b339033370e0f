"""The examples in docstrings give what they show."""

import doctest
import importlib
from pathlib import Path

import pytest

import q3d_plugin

PACKAGE = Path(q3d_plugin.__file__).parent
FRAMEWORKS = {'mmcv', 'mmdet', 'mmdet3d', 'mmengine', 'pcdet', 'spconv'}
MODULES = [
    '.'.join(file.relative_to(PACKAGE.parent).with_suffix('').parts).replace('.__init__', '')
    for file in sorted(PACKAGE.rglob('*.py'))
    if '>>>' in file.read_text()
]


@pytest.mark.parametrize('name', MODULES)
def test_the_examples_of(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or '').split('.')[0]
        if missing not in FRAMEWORKS:
            raise
        pytest.skip(f'{missing} is not installed')
    shown = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(example, out=shown.append)
    assert runner.summarize(verbose=False).attempted, 'no docstring has the lines that the file has'
    assert not shown, ''.join(shown)
