"""The shape of the package: files that can be read at one go, imports that point downwards only."""

import ast
from pathlib import Path

import pytest

import q3d_plugin

ROOT = Path(q3d_plugin.__file__).parent
FILES = sorted(p for p in ROOT.rglob('*.py') if 'configs' not in p.relative_to(ROOT).parts)

# From the bottom up: a module imports from its own level's package and from the levels before it.
LEVELS = (
    (
        'errors',
        'files',
        'text',
        'metrics',
        'extras',
        'shipped',
        'progress',
        'memo',
        'bev_ops',
        'stand_in',
        'cpu',
        'kernel',
        'scratch',
        'straight_through',
    ),
    ('numerics', 'recipe'),
    ('observer', 'modes', 'trained_range'),
    ('quantizer',),
    ('layers',),
    ('calibration',),
    ('transforms',),
    ('coverage', 'safe_load', 'checkpoint_file', 'checkpoints', 'run_record'),
    ('lifecycle', 'training'),
    ('frame', 'raw_outputs', 'synthetic', 'adapter', 'bench', 'camera_input', 'fusion_parts'),
    ('mmdet3d', 'openpcdet'),
    ('frameworks', 'analysis', 'zoo', 'benchmark', 'launch', 'toy_nuscenes', 'gpu_check'),
    ('commands',),
)
LEVEL_OF = {name: i for i, level in enumerate(LEVELS) for name in level}
FRAMEWORKS = {
    'pcdet': 'openpcdet',
    'mmdet3d': 'mmdet3d',
    'mmengine': 'mmdet3d',
    'mmcv': 'mmdet3d',
    'mmdet': 'mmdet3d',
    'projects': 'mmdet3d',
}


def part_of(path):
    """The first part of a module's name below the package; empty for the package itself."""
    return '' if len(path) < 2 else path[1]


def name_of(file):
    """The dotted name of a file of the package, as a list."""
    parts = ['q3d_plugin', *file.relative_to(ROOT).with_suffix('').parts]
    return parts[:-1] if parts[-1] == '__init__' else parts


def imports_of(file):
    """(module, imported name, line) of every import of a file, those inside of functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, '', node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{file}:{node.lineno}: a relative import'
            for alias in node.names:
                yield node.module, alias.name, node.lineno


def modules_of(module, name):
    """The module that an import of ``name`` from ``module`` reads, as a list."""
    inner = ROOT.joinpath(*module.split('.')[1:], name)
    is_module = name and (inner.with_suffix('.py').is_file() or inner.is_dir())
    return [*module.split('.'), name] if is_module else module.split('.')


@pytest.mark.parametrize('file', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_has_at_most_400_lines(file):
    assert len(file.read_text().splitlines()) <= 400


@pytest.mark.parametrize('file', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(file):
    mine = name_of(file)
    if len(mine) < 2 or mine[1] == '__main__':
        return
    assert mine[1] in LEVEL_OF, f'{mine[1]} has no level: say in LEVELS where it belongs'
    for module, name, line in imports_of(file):
        if not module.startswith('q3d_plugin'):
            continue
        other = part_of(modules_of(module, name))
        if other in ('', '__version__', mine[1]):
            continue
        assert LEVEL_OF[other] <= LEVEL_OF[mine[1]], (
            f'{file}:{line}: {mine[1]} imports {other}, which is above'
        )


@pytest.mark.parametrize('file', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_private_name_crosses_a_package(file):
    mine = name_of(file)
    package = mine if file.name == '__init__.py' else mine[:-1]
    for module, name, line in imports_of(file):
        if not module.startswith('q3d_plugin'):
            continue
        for i, word in enumerate([*module.split('.'), name]):
            if word.startswith('_') and not word.startswith('__'):
                holder = [*module.split('.'), name][:i]
                assert holder[: len(package)] == package, f'{file}:{line}: {word} of {".".join(holder)}'


@pytest.mark.parametrize('file', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_frameworks_are_imported_by_their_adapters_alone(file):
    mine = name_of(file)
    for module, _, line in imports_of(file):
        adapter = FRAMEWORKS.get(module.split('.')[0])
        assert adapter is None or mine[1] == adapter, f'{file}:{line}: {module}'


def test_there_is_no_circle_of_imports_between_modules():
    edges = {}
    for file in FILES:
        mine = '.'.join(name_of(file))
        top = [n for n in ast.parse(file.read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))]
        found = set()
        for node in top:
            for alias in node.names:
                if isinstance(node, ast.ImportFrom) and node.module.startswith('q3d_plugin'):
                    found.add('.'.join(modules_of(node.module, alias.name)))
        edges[mine] = found - {mine}
    done, path = set(), []

    def visit(module):
        assert module not in path, ' -> '.join([*path[path.index(module) :], module])
        if module in done or module not in edges:
            return
        path.append(module)
        for other in sorted(edges[module]):
            visit(other)
        path.pop()
        done.add(module)

    for module in sorted(edges):
        visit(module)
