"""A frame with cameras through the pipeline of the unmodified BEVFusion: set MMDET3D_ROOT to a checkout."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from frame_toys import by_matrices, cut_image, pixels_of, recorded

ROOT = os.environ.get('MMDET3D_ROOT')
pytestmark = [
    pytest.mark.skipif(not ROOT, reason='MMDET3D_ROOT is not set'),
    pytest.mark.skipif(torch.cuda.is_available(), reason='CPU mode is off where CUDA is'),
]
TOY = Path(__file__).resolve().parents[2] / 'configs' / 'mmdet3d' / 'toy_bevfusion_w8a8.py'
CONFIG = 'bevfusion_lidar-cam_voxel0075_second_secfpn_8xb4-cyclic-20e_nus-3d'
MEAN, STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])


@pytest.fixture(scope='module')
def built():
    """The adapter, the config and its float model with random weights; nothing is fetched for it."""
    pytest.importorskip('mmdet3d')
    from q3d_plugin.mmdet3d.build import MMDet3D
    from q3d_plugin.mmdet3d.projects import upstream_config

    adapter = MMDet3D()
    cfg = adapter.read(upstream_config(CONFIG))
    return adapter, cfg, adapter.build(cfg)


@pytest.fixture(scope='module')
def frame(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp('frame'))


def test_the_frame_is_what_the_pipeline_makes_of_it(built, frame):
    adapter, cfg, model = built
    batch = adapter.frame_batch(cfg, model, frame)
    (points,), images = batch['inputs']['points'], batch['inputs']['imgs'][0]
    inside = (np.abs(frame.points[:, :2]) < 54).all(1) & (frame.points[:, 2] > -5) & (frame.points[:, 2] < 3)
    assert torch.equal(points, torch.from_numpy(frame.points[inside]))
    info = batch['data_samples'][0].metainfo
    near = frame.points[:, :3].astype(float)
    for i, camera in enumerate(frame.cameras):
        expected = (cut_image(camera) - MEAN) / STD
        np.testing.assert_allclose(images[i].numpy().transpose(1, 2, 0), expected, atol=1e-3)
        mine, depth = pixels_of(camera, near)
        theirs = by_matrices(near, info['lidar2img'][i], info['img_aug_matrix'][i])
        np.testing.assert_allclose(theirs[depth > 1], mine[depth > 1], rtol=1e-3, atol=0.1)
        np.testing.assert_allclose(np.array(info['cam2lidar'][i]) @ camera.from_lidar, np.eye(4), atol=1e-4)


def test_the_generated_frame_of_the_survey_runs_through_the_camera_branch(built):
    adapter, cfg, model = built
    batch = adapter.synthetic_batch(cfg, model)
    assert batch['inputs']['imgs'].shape == (1, 6, 3, 256, 704)
    info, seen = batch['data_samples'][0].metainfo, {}
    view = model.view_transform
    matrices = [
        torch.as_tensor(np.asarray(info[k]), dtype=torch.float32)[None]
        for k in ('lidar2img', 'cam2img', 'cam2lidar', 'img_aug_matrix', 'lidar_aug_matrix')
    ]
    handle = view.dtransform.register_forward_pre_hook(lambda m, a: seen.update(depth=a[0]))
    points = [p.clone() for p in batch['inputs']['points']]
    with torch.no_grad():
        features = view(torch.randn(1, 6, 256, 32, 88), points, *matrices, [info])
    handle.remove()
    assert features.shape == (1, 80, 180, 180) and features.abs().sum() > 0
    # Every camera sees points, and none is behind it.
    assert ((seen['depth'] > 0).flatten(1).sum(1) > 200).all() and (seen['depth'] >= 0).all()


def test_a_config_of_points_alone_packs_no_images(built):
    from q3d_plugin.mmdet3d.projects import upstream_config

    adapter = built[0]
    assert adapter.reads_images(built[1])
    assert not adapter.reads_images(adapter.read(upstream_config(CONFIG.replace('-cam', ''))))


@pytest.fixture(scope='module')
def toy(frame):
    """The toy BEVFusion, its head quantized too, calibrated on the frame; its forward pass and batch."""
    from q3d_plugin import lifecycle
    from q3d_plugin.benchmark.subject import settle_batch_norm
    from q3d_plugin.mmdet3d.build import MMDet3D
    from q3d_plugin.recipe import Recipe

    adapter = MMDet3D()
    cfg = adapter.read(TOY)
    torch.manual_seed(0)
    reference, model = adapter.build(adapter.float_config(cfg)), adapter.build(cfg)
    batch = adapter.frame_batch(cfg, reference, frame)
    settle_batch_norm(reference, lambda: adapter.forward_of(reference)(batch))
    adapter.load(model, reference.state_dict())
    lifecycle.configure(model, Recipe.from_dict({'include': ['bbox_head.*'], 'calibration': {'frames': 1}}))
    forward = torch.no_grad()(adapter.forward_of(model))
    lifecycle.calibrate(model, [batch], forward)
    return model, forward, batch


def test_replays_of_the_toy_are_whole_passes_and_compute_what_depends_on_a_layer(toy):
    from q3d_plugin.analysis.replay import Replay
    from q3d_plugin.analysis.switch import Switch

    model, forward, batch = toy
    switch, replay = Switch(model), Replay(model, forward)
    branches = {
        name: next(n for n in switch.names if n.startswith(name))
        for name in (
            'img_backbone',
            'pts_middle_encoder',
            'view_transform.downsample',
            'pts_neck',
            'bbox_head',
        )
    }
    slow, computed = {}, {}
    with switch.restored():
        for name in branches.values():
            switch.only({name})
            slow[name] = forward(batch)
        switch.only(())
        with replay.installed():
            replay.record(batch)
            for branch, name in branches.items():
                switch.set(name, True)
                found = replay.replay(batch, [name])
                switch.set(name, False)
                computed[branch] = {n.split('.')[0] for n in replay.computed}
                assert all(torch.equal(found[k], v) for k, v in slow[name].items()), name
    camera = {'img_backbone', 'img_neck', 'view_transform'}
    assert camera <= computed['img_backbone']
    for branch in ('pts_middle_encoder', 'pts_neck', 'bbox_head'):
        assert not camera & computed[branch], branch
    assert computed['view_transform.downsample'] == {
        'view_transform', 'fusion_layer', 'pts_backbone', 'pts_neck', 'bbox_head'
    }  # fmt: skip
    assert computed['bbox_head'] == {'bbox_head'}


def test_the_head_of_the_toy_is_compared_by_proposals(toy):
    from q3d_plugin.analysis.measures import OutputError
    from q3d_plugin.analysis.proposals import has_proposals

    _, forward, batch = toy
    outputs = forward(batch)
    assert has_proposals(outputs)
    order = torch.randperm(outputs['0.0.query_labels'].shape[-1])
    other = {k: v if 'dense' in k else v[..., order] for k, v in outputs.items()}
    error = OutputError()
    error.add(outputs, other)
    names = {n.rpartition('.')[2] for n in error.tensors}
    assert names == {'dense_heatmap', 'center', 'height', 'dim', 'rot', 'vel', 'heatmap'}
    # Random weights give several proposals of one class in one cell's distance: each finds the nearest.
    assert error.relative_l1 < 1e-3
