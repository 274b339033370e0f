"""README.md and docs/ agree with the code: keys, targets, errors, types, commands, links and the example."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

import pytest

from q3d_plugin import commands
from q3d_plugin.errors import Q3DError
from q3d_plugin.recipe import CALIBRATORS, FAMILIES, TARGETS, WEIGHT_CALIBRATORS, Recipe, keys_of
from q3d_plugin.recipe.schema import fields_of
from q3d_plugin.recipe.specs import Override, SmoothOverride

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / 'docs').glob('*.md'))
PAGES = [ROOT / 'README.md', *DOCS]
OF_FRAMEWORKS = ('test', 'train')
"""Commands whose arguments are those of the frameworks' scripts."""

LISTS = {'overrides[]': Override, 'smoothquant.overrides[]': SmoothOverride}
LAYERS = {
    'convolution': 'convolutions',
    'linear': 'linear layers',
    'sparse': 'sparse convolutions',
    'elementwise': 'additions and concatenations',
    'matmul': 'products of two activations',
}


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def blocks(text: str, language: str = r'\w*') -> List[str]:
    """The contents of fenced code blocks."""
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.MULTILINE | re.DOTALL)


def cells(line: str) -> List[str]:
    return [cell.strip() for cell in line.strip().strip('|').split(' | ')]


# The recipe.


def key_rows() -> Dict[str, List[str]]:
    """The table of keys: key -> default, values, meaning."""
    section = text_of('docs/recipe.md').partition('## Keys')[2].partition('### ')[0]
    rows = [cells(line) for line in section.splitlines() if line.startswith('| `')]
    return {row[0].strip('`'): row[1:] for row in rows}


def test_every_key_of_the_recipe_is_in_the_table_and_no_other():
    expected = set(keys_of(Recipe))
    for prefix, spec in LISTS.items():
        expected |= {f'{prefix}.{key}' for key in fields_of(spec)}
    assert set(key_rows()) == expected


@pytest.mark.parametrize('key', keys_of(Recipe))
def test_the_default_in_the_table_changes_nothing(key):
    default = eval(key_rows()[key][0].strip('`'), {'dict': dict})
    given = default
    for name in reversed(key.split('.')):
        given = {name: given}
    plain = {'smoothquant': {}} if key.startswith('smoothquant.') else {}
    if key.startswith('training.distillation.'):
        plain = {'training': {'distillation': {}}}
    assert Recipe.from_dict(given) == Recipe.from_dict(plain)


def test_keys_without_a_default_are_named_as_required():
    for prefix, spec in LISTS.items():
        for name, field in fields_of(spec).items():
            needed = field.default is field.default_factory
            assert (key_rows()[f'{prefix}.{name}'][0] == 'required') == needed, name


def test_the_table_names_every_target_and_calibrator():
    rows = key_rows()
    known = {
        'target': TARGETS,
        'activation.calibrator': CALIBRATORS,
        'weight.calibrator': WEIGHT_CALIBRATORS,
    }
    for key, names in known.items():
        assert re.findall(r"'(\w+)'", rows[key][1]) == list(names)


def target_lines() -> List[str]:
    """The lines of the table of targets, from the table of the program."""
    lines = []
    for target in TARGETS.values():
        for rule in target.rules:
            layers = ', '.join(LAYERS[f] for f in rule.families)
            layers = 'all' if set(rule.families) == set(FAMILIES) else layers
            layers += ', inputs float' if rule.weight_only else ''
            key = re.sub('^smooth[.]', 'smoothquant.', rule.key)
            allowed = ', '.join(f'`{value!r}`' for value in rule.allowed)
            line = [f'`{target.name}`', f'`{key}`', layers, allowed, rule.reason, rule.source]
            lines.append(f'| {" | ".join(line)} |')
    return lines


def test_the_table_of_targets_is_that_of_the_program():
    page = text_of('docs/recipe.md').splitlines()
    start = page.index('| target | key | layers | may be | because | source |') + 2
    wanted = target_lines()
    assert page[start : start + len(wanted)] == wanted
    assert not page[start + len(wanted)]
    facts = [f'- `{t.name}`: {fact} ({source})' for t in TARGETS.values() for fact, source in t.facts]
    assert [line for line in page if line.startswith(tuple(f'- `{name}`: ' for name in TARGETS))] == facts


def test_the_errors_in_the_documentation_are_those_of_the_program():
    (block,) = [b for b in blocks(text_of('docs/recipe.md'), 'text') if b.startswith('recipe = ')]
    lines = block.splitlines()
    assert len(lines) >= 10
    for given, message in zip(lines[::2], lines[1::2]):
        with pytest.raises(Q3DError) as caught:
            Recipe.from_dict(eval(given.partition(' = ')[2], {'dict': dict}))
        assert message.strip() == str(caught.value)


def test_recipes_in_code_blocks_are_valid():
    found = 0
    for page in PAGES:
        for block in blocks(page.read_text(), 'python'):
            for node in ast.walk(ast.parse(block)):
                keyword = isinstance(node, ast.keyword) and node.arg == 'recipe'
                named = isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == 'recipe'
                recipe = node.value if keyword or named else None
                if isinstance(recipe, ast.Call):
                    Recipe.from_dict(eval(ast.unparse(recipe), {'dict': dict}))
                    found += 1
    assert found >= 3


# Types.


@pytest.mark.parametrize('framework', ['mmdet3d', 'openpcdet'])
def test_every_type_with_a_quant_type_is_listed(framework):
    source = text_of(f'q3d_plugin/{framework}/parts.py')
    source = source[source.index('\nPARTS = (') :]
    calls = [n for n in ast.walk(ast.parse(source[: source.index('\n)\n') + 3])) if isinstance(n, ast.Call)]
    place = {'mmdet3d': 0, 'openpcdet': 1}[framework]
    names = [call.args[place].value for call in calls if getattr(call.func, 'id', '') == 'Part']
    assert len(names) > 40
    title = {'mmdet3d': '### MMDetection3D', 'openpcdet': '### OpenPCDet'}[framework]
    section = text_of('docs/coverage.md').partition(title)[2].partition('\n#')[0]
    rows = [line for line in section.splitlines() if line.startswith('| ')]
    listed = {name for row in rows for name in re.findall('`(.+?)`', row)}
    assert set(names) <= listed


# Commands.


def commands_in(text: str) -> List[str]:
    """Command lines of ``q3d`` in code: without a prompt, one a line, continued lines joined."""
    code = [re.sub(r'\\\n\s*', '', b) for b in blocks(text)]
    lines = [line.strip() for block in code for line in block.splitlines()]
    text = re.sub(r'^```.*?^```', '', text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall('`([^`\n]+)`', text)
    found = [re.search(r'(?:^|\s)(?:q3d|-m q3d_plugin) ([a-z].*)', line) for line in lines]
    return [match.group(1).partition('  #')[0].strip() for match in found if match]


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_every_command_in_the_documentation_exists(page):
    for line in commands_in(page.read_text()):
        assert line.split()[0] in commands.command_names(), line


def test_every_command_is_in_the_readme():
    named = {line.split()[0] for line in commands_in(text_of('README.md'))}
    assert named >= set(commands.command_names())


def options_of(name: str, capsys) -> str:
    """The help of a command."""
    with pytest.raises(SystemExit) as ended:
        commands.main([name, '--help'])
    assert not ended.value.code
    return capsys.readouterr().out


def test_every_option_of_a_command_in_the_documentation_exists(capsys):
    seen = 0
    for page in PAGES:
        for line in commands_in(page.read_text()):
            name = line.split()[0]
            if name in OF_FRAMEWORKS or name not in commands.command_names():
                continue
            known = re.findall(r'--[a-z][a-z-]*', options_of(name, capsys))
            for option in re.findall(r'(?<=\s)--[a-z][a-z-]*', line):
                assert option in known, (page.name, line)
                seen += 1
    assert seen >= 5


def test_scripts_in_the_documentation_exist():
    for page in PAGES:
        for script in re.findall(r'\btools/[\w/]+\.(?:sh|py)\b', page.read_text()):
            assert (ROOT / script).is_file(), (page.name, script)


# Pages.


def slug(title: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-')


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_every_relative_link_leads_somewhere(page):
    text = page.read_text()
    links = re.findall(r'\]\(([^)\s]+)\)', text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if '://' in link:
            continue
        name, _, anchor = link.partition('#')
        target = page.parent / name if name else page
        assert target.is_file(), link
        if anchor:
            titles = re.findall(r'^#+ (.+)$', target.read_text(), re.MULTILINE)
            assert anchor in map(slug, titles), link


def test_the_readme_is_short_has_a_picture_and_leads_to_every_page():
    text = text_of('README.md')
    assert len(text.splitlines()) <= 150
    assert 'docs/images/demo.png' in text
    for page in DOCS:
        assert f'(docs/{page.name})' in text


def test_every_package_is_in_the_structure():
    text = text_of('docs/structure.md')
    packages = [p.parent.name for p in (ROOT / 'q3d_plugin').glob('*/__init__.py')]
    assert packages
    for name in packages:
        assert f'{name}/' in text, name


# The worked example.


def normalized(table: str) -> List[List[str]]:
    """The words of a table by line, without ranges, which depend on random numbers."""
    return [re.sub(r'amax \S+', 'amax', line).split() for line in table.strip().splitlines()[2:]]


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, '-c', code, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )


def test_the_example_runs_and_prints_the_table_beside_it():
    pytest.importorskip('mmdet3d')
    text = text_of('docs/add_a_detector.md')
    code = ''.join(blocks(text, 'python')[:2])
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 40
    done = run(code)
    assert done.returncode == 0, done.stderr
    (table,) = [b for b in blocks(text, 'text') if b.startswith('layer ')]
    printed = done.stdout[done.stdout.index('layer ') :]
    assert normalized(printed) == normalized(table)


OPENPCDET = """
import sys
sys.path.insert(0, 'tests/openpcdet')
from openpcdet_double import double_as_pcdet
code = sys.argv.pop(1)
with double_as_pcdet() as pcdet:
    from pcdet.models import backbones_2d, detectors
    backbones_2d.MyBackbone = type('MyBackbone', (backbones_2d.__all__['BaseBEVBackbone'],), {})
    detectors.MyDetector = type('MyDetector', (detectors.__all__['CenterPoint'],), {})
    try:
        exec(code)
    except SystemExit as ended:
        assert ended.code == 0, ended.code
    from q3d_plugin.layers import QuantUnit
    from easydict import EasyDict
    cfg = dict(LAYER_NUMS=[1], LAYER_STRIDES=[1], NUM_FILTERS=[4])
    cfg = EasyDict(cfg, UPSAMPLE_STRIDES=[1], NUM_UPSAMPLE_FILTERS=[4])
    part = backbones_2d.__all__['QuantMyBackbone'](model_cfg=cfg, input_channels=2)
    print('layers', sum(isinstance(m, QuantUnit) for m in part.modules()))
    print('detector', detectors.__all__['QuantMyDetector'].__mro__[1].__name__)
"""


def test_the_script_for_openpcdet_registers_its_types_and_hands_over(monkeypatch):
    pytest.importorskip('spconv')
    pytest.importorskip('easydict')
    monkeypatch.delenv('OPENPCDET_ROOT', raising=False)
    (script,) = [b for b in blocks(text_of('docs/add_a_detector.md'), 'python') if 'quant.py' in b]
    done = run(OPENPCDET, script, '--version')
    assert done.returncode == 0, done.stderr
    assert re.findall(r'^q3d_plugin \d', done.stdout, re.MULTILINE)
    assert re.search(r'^layers [1-9]', done.stdout, re.MULTILINE)
    assert 'detector QuantDetectorMixin' in done.stdout
