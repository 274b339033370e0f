"""There is one core: the same weights give the same ranges through both adapters."""

import pytest
import same_core

pytest.importorskip('mmdet3d')


def test_the_same_weights_and_voxels_give_the_same_ranges_in_both_frameworks(adapter):
    # 21 sparse convolutions, 6 and 2 in 2D, 8 additions, a concatenation.
    assert same_core.check_both('pcdet') == 21 + 8 + 8 + 1
