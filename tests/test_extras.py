"""Which extra brings a package that is missing."""

import re
from pathlib import Path

import pytest

from q3d_plugin.extras import EXTRAS, hint

PROJECT = (Path(__file__).resolve().parents[1] / 'pyproject.toml').read_text()
# Modules whose package has another name; the devkit of nuScenes needs pyquaternion.
PACKAGES = {
    'cv2': 'opencv-python-headless',
    'nuscenes': 'nuscenes-devkit',
    'pkg_resources': 'setuptools',
    'pyquaternion': 'nuscenes-devkit',
    'skimage': 'scikit-image',
    'yaml': 'pyyaml',
}


@pytest.mark.parametrize('module', sorted(EXTRAS))
def test_the_extra_that_is_named_has_the_package(module):
    section = PROJECT.partition('[project.optional-dependencies]')[2].partition('\n[')[0]
    listed = re.search(rf'^{EXTRAS[module]} = \[(.*)\]$', section, re.MULTILINE).group(1)
    names = re.findall(r'"([A-Za-z0-9_-]+)', listed)
    assert PACKAGES.get(module, module) in names


def test_only_known_modules_have_a_hint():
    assert hint(ImportError('No module named x', name='x')) == ''
    assert hint(ImportError('broken')) == ''
    assert 'q3d-plugin[mmdet3d]' in hint(ImportError('no', name='mmengine.config'))
    assert '[cu120]' in hint(ImportError('no', name='spconv'))
