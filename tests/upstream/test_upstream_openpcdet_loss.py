"""The loss of a detector of the real OpenPCDet outside of its scripts: set OPENPCDET_ROOT to a checkout."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from q3d_plugin.frameworks import adapter_of

ROOT = os.environ.get('OPENPCDET_ROOT')
pytestmark = [
    pytest.mark.skipif(not ROOT, reason='OPENPCDET_ROOT is not set'),
    pytest.mark.usefixtures('spconv_without_mmdet3d'),
]
CONFIG = Path(__file__).resolve().parents[2] / 'configs' / 'openpcdet' / 'toy_centerpoint_voxel_w8a8.yaml'


def test_a_batch_with_annotations_can_be_given_again():
    adapter = adapter_of(str(CONFIG))
    cfg = adapter.read(CONFIG)
    model = adapter.build(adapter.float_config(cfg))
    draw = np.random.default_rng(0)
    points = np.concatenate([draw.normal(size=(2000, 3)) * [15, 15, 0.6], np.zeros((2000, 2))], 1)
    batch = adapter.points_batch(model, points.astype(np.float32))
    # x y z l w h heading vx vy class, of six classes.
    boxes = [[*draw.normal(size=2) * 10, -1, 4, 2, 1.5, 0.3, 0, 0, i + 1] for i in range(6)]
    batch['gt_boxes'] = torch.tensor([boxes], dtype=torch.float32)
    before = batch['gt_boxes'].clone()
    model.train()
    losses = [adapter.loss(model, batch) for _ in range(2)]
    assert torch.equal(batch['gt_boxes'], before)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-4) and losses[0] > 0
    losses[0].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
