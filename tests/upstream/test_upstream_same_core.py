"""There is one core: the same weights give the same ranges through both adapters, with the real OpenPCDet."""

import os
import sys
from pathlib import Path

import pytest

ROOT = os.environ.get('OPENPCDET_ROOT')
pytestmark = pytest.mark.skipif(not ROOT, reason='OPENPCDET_ROOT is not set')
pytest.importorskip('mmdet3d')


def test_the_same_weights_and_voxels_give_the_same_ranges_in_both_frameworks(monkeypatch):
    from q3d_plugin import openpcdet

    openpcdet.register(ROOT)
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / 'openpcdet'))
    import same_core

    try:
        assert same_core.check_both('pcdet') == 21 + 8 + 8 + 1
    finally:
        del sys.modules['same_core']
