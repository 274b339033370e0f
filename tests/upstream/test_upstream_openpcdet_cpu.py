"""The unmodified, unbuilt OpenPCDet in CPU mode: set OPENPCDET_ROOT to a checkout to run these."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = os.environ.get('OPENPCDET_ROOT')
pytestmark = [
    pytest.mark.skipif(not ROOT, reason='OPENPCDET_ROOT is not set'),
    pytest.mark.skipif(torch.cuda.is_available(), reason='CPU mode is off where CUDA is'),
    pytest.mark.usefixtures('spconv_without_mmdet3d'),
]

REPOSITORY = Path(__file__).resolve().parents[2]
FRAME = REPOSITORY.parent / 'shared' / 'data' / 'nuscenes_frame'
CLASSES = {
    'car', 'truck', 'construction_vehicle', 'bus', 'trailer',
    'barrier', 'motorcycle', 'bicycle', 'pedestrian', 'traffic_cone',
}  # fmt: skip


@pytest.fixture(scope='module')
def pcdet():
    from q3d_plugin.openpcdet.cpu import import_pcdet

    return import_pcdet()


def points():
    """The points of a real frame where there is one, else of a made-up one: (N, 5), with a timestamp."""
    files = sorted(FRAME.glob('*LIDAR_TOP*.bin'))
    if files:
        cloud = np.fromfile(files[0], dtype=np.float32).reshape(-1, 5).copy()
        cloud[:, 4] = 0
        return cloud
    random = np.random.default_rng(0)
    distance, angle = random.gamma(2.0, 8.0, 30000), random.uniform(-np.pi, np.pi, 30000)
    columns = [distance * np.cos(angle), distance * np.sin(angle), random.normal(-1.2, 0.7, 30000)]
    return np.stack([*columns, random.uniform(0, 255, 30000), np.zeros(30000)], axis=1).astype(np.float32)


def build(config, tmp_path, monkeypatch):
    """The data set and the model of a config, with OpenPCDet's own functions. No data is needed."""
    from easydict import EasyDict
    from pcdet.config import cfg_from_yaml_file
    from pcdet.datasets import build_dataloader
    from pcdet.models import build_network
    from pcdet.utils import common_utils

    monkeypatch.chdir(Path(ROOT) / 'tools')  # where OpenPCDet's configs look for their base
    cfg = cfg_from_yaml_file(str(config), EasyDict())
    cfg.DATA_CONFIG.DATA_PATH = str(tmp_path)
    dataset, _, _ = build_dataloader(
        cfg.DATA_CONFIG,
        cfg.CLASS_NAMES,
        batch_size=1,
        dist=False,
        workers=0,
        logger=common_utils.create_logger(),
        training=False,
    )
    torch.manual_seed(0)
    model = build_network(model_cfg=cfg.MODEL, num_class=len(cfg.CLASS_NAMES), dataset=dataset)
    model.cuda()
    return dataset, model


def batch_of(dataset, with_truth=True):
    frame = {'points': points(), 'frame_id': 'frame', 'metadata': {'token': 'frame'}}
    if with_truth:
        frame['gt_names'] = np.array(['car', 'pedestrian', 'truck'])
        frame['gt_boxes'] = np.array(
            [
                [10, 3, -1, 4.5, 1.9, 1.6, 0.5, 0, 0],
                [-8, 6, -1, 0.7, 0.7, 1.7, 0, 1, 0],
                [20, -9, 0, 8.0, 2.6, 3.0, 1.5, 0, 0],
            ],
            dtype=np.float32,
        )
    return dataset.collate_batch([dataset.prepare_data(frame)])


def test_it_imports_and_says_its_version(pcdet):
    assert Path(pcdet.__file__).resolve().parents[1] == Path(ROOT).resolve()
    assert pcdet.__version__.startswith('0.')


def test_importing_again_changes_nothing(pcdet):
    from pcdet.ops.iou3d_nms import iou3d_nms_cuda

    from q3d_plugin.openpcdet.cpu import enable_openpcdet_cpu_mode, import_pcdet

    before = torch.Tensor.cuda, torch.nn.Module.cuda
    assert import_pcdet(ROOT) is pcdet
    assert enable_openpcdet_cpu_mode() is True
    assert (torch.Tensor.cuda, torch.nn.Module.cuda) == before
    assert sys.modules['pcdet.ops.iou3d_nms.iou3d_nms_cuda'] is iou3d_nms_cuda


def test_nothing_is_written_into_the_checkout(pcdet):
    assert not (Path(ROOT) / 'pcdet' / 'version.py').exists()


def test_other_libraries_do_not_see_the_stand_ins(pcdet):
    from q3d_plugin.openpcdet.cpu import OPTIONAL, StandIn

    assert not [n for n in OPTIONAL if isinstance(sys.modules.get(n), StandIn)]


def test_its_wrappers_take_the_cpu_operators(pcdet):
    from pcdet.ops.iou3d_nms import iou3d_nms_utils
    from pcdet.ops.roiaware_pool3d import roiaware_pool3d_utils

    boxes = torch.tensor(
        [[0, 0, 0, 4, 2, 2, 0.3], [0.2, 0, 0, 4, 2, 2, 0.3], [9, 9, 0, 4, 2, 2, 1.0]]
    ).float()
    kept, _ = iou3d_nms_utils.nms_gpu(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.2, pre_maxsize=100)
    assert kept.tolist() == [1, 2]
    kept, _ = iou3d_nms_utils.nms_normal_gpu(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.2)
    assert kept.tolist() == [1, 2]
    iou = iou3d_nms_utils.boxes_iou3d_gpu(boxes, boxes)
    assert torch.allclose(iou.diagonal(), torch.ones(3), atol=1e-6) and iou[0, 2] == 0
    assert torch.allclose(iou3d_nms_utils.boxes_iou_bev(boxes, boxes), iou, atol=1e-5)
    assert torch.allclose(iou3d_nms_utils.boxes_bev_iou_cpu(boxes, boxes), iou, atol=1e-5)
    assert torch.allclose(iou3d_nms_utils.boxes_aligned_iou3d_gpu(boxes, boxes), torch.ones(3, 1), atol=1e-6)
    assert torch.allclose(iou3d_nms_utils.paired_boxes_iou3d_gpu(boxes, boxes), torch.ones(3), atol=1e-6)

    from pcdet.ops.bev_pool import bev_pool

    x, cells = torch.randn(50, 3, requires_grad=True), torch.randint(0, 2, (50, 4))
    out = bev_pool(x, cells, 2, 2, 2, 2)
    expected = torch.zeros(2, 3, 2, 2, 2)
    for row, (i, j, k, b) in zip(x.detach(), cells.tolist()):
        expected[b, :, k, i, j] += row
    assert torch.allclose(out, expected, atol=1e-5)
    out.square().sum().backward()
    i, j, k, b = cells.T
    assert torch.allclose(x.grad, 2 * expected[b, :, k, i, j], atol=1e-5)

    centres = boxes[:, :3]
    assert roiaware_pool3d_utils.points_in_boxes_cpu(centres, boxes).tolist()[2] == [0, 0, 1]
    found = roiaware_pool3d_utils.points_in_boxes_gpu(centres[None], boxes[None])
    assert found.tolist() == [[0, 0, 2]]


def test_an_operator_without_a_cpu_version_is_named(pcdet):
    from pcdet.ops.pointnet2.pointnet2_stack import pointnet2_utils

    with pytest.raises(NotImplementedError, match=r'pointnet2_stack_cuda\.\w+ cannot be used here'):
        pointnet2_utils.farthest_point_sample(torch.zeros(1, 8, 3), 4)


@pytest.mark.parametrize('name', ['cbgs_voxel0075_res3d_centerpoint', 'cbgs_dyn_pp_centerpoint'])
def test_full_size_centerpoint_runs_end_to_end(pcdet, name, tmp_path, monkeypatch):
    from pcdet.models import load_data_to_gpu

    dataset, model = build(f'cfgs/nuscenes_models/{name}.yaml', tmp_path, monkeypatch)
    batch = batch_of(dataset)
    load_data_to_gpu(batch)
    # Random weights find nothing above 0.1; without a threshold the non-maximum suppression has work to do.
    model.dense_head.model_cfg.POST_PROCESSING.SCORE_THRESH = 0.0
    model.eval()
    with torch.no_grad():
        predictions, recall = model(batch)
    assert recall['gt'] == 3
    (prediction,) = predictions
    boxes, scores, labels = (prediction[f'pred_{k}'] for k in ('boxes', 'scores', 'labels'))
    assert boxes.shape == (len(scores), 9) and 6 <= len(scores) <= 6 * 83
    assert torch.isfinite(boxes).all() and torch.isfinite(scores).all()
    assert labels.min() >= 1 and labels.max() <= len(CLASSES)
    annotations = dataset.generate_prediction_dicts(batch, predictions, dataset.class_names)
    assert set(annotations[0]['name']) <= CLASSES


@pytest.mark.parametrize('name', ['toy_centerpoint_voxel', 'toy_centerpoint_pillar'])
def test_toy_centerpoint_has_a_gradient_and_loads_its_checkpoint(pcdet, name, tmp_path, monkeypatch):
    from pcdet.models import load_data_to_gpu
    from pcdet.utils import common_utils

    folder = REPOSITORY / 'configs' / 'openpcdet'
    dataset, model = build(folder / f'{name}.yaml', tmp_path, monkeypatch)
    checkpoint = folder / f'{name}.pth'
    if checkpoint.is_file():
        assert checkpoint.stat().st_size < 6.3e6
        state = torch.load(checkpoint, weights_only=True)['model_state']
        assert set(state) == set(model.state_dict())
        model.load_params_from_file(str(checkpoint), common_utils.create_logger(), to_cpu=True)
        assert all(p.dtype == torch.float32 for p in model.parameters())
    batch = batch_of(dataset)
    load_data_to_gpu(batch)
    model.train()
    losses, _, _ = model(batch)
    losses['loss'].backward()
    assert torch.isfinite(losses['loss'])
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
