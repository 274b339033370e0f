"""Configs and checkpoints that come with the plugin."""

from pathlib import Path

import pytest

from q3d_plugin import shipped

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'


def test_every_file_of_configs_is_named():
    files = {p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob('*') if p.is_file()}
    assert set(shipped.config_names()) == {f for f in files if '__pycache__' not in f}
    assert shipped.configs_folder() == CONFIGS


@pytest.mark.parametrize('before', ['', 'configs/', './', './configs/'])
def test_names_with_and_without_the_folder_are_found_anywhere(before, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = 'mmdet3d/study/recipes.py'
    assert shipped.find_shipped(before + name) == str(CONFIGS / name)
    local = tmp_path / before / name
    local.parent.mkdir(parents=True)
    local.write_text('')
    assert shipped.find_shipped(before + name) == before + name


@pytest.mark.parametrize(
    'given', ['mmdet3d/none.py', 'recipes.py', '/mmdet3d/study/recipes.py', '../configs', '']
)
def test_anything_else_stays_as_it_is(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.find_shipped(given) == given
