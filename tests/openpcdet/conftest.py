"""The contract double of OpenPCDet in the place of ``pcdet``, and the adapter on top of it."""

import importlib
import json
import logging
import types
import uuid

import pytest
import torch
from easydict import EasyDict
from openpcdet_double import CLASSES, DATA, MODEL, double_as_pcdet, randomize

from q3d_plugin.cpu import enable_cpu_mode


@pytest.fixture(scope='module', autouse=True)
def _alone(spconv_without_mmdet3d):
    """No test of this folder wants what MMDetection3D makes of spconv."""


@pytest.fixture(scope='module')
def adapter():
    """The adapter's modules, registered in the double: ``adapter.detector``, ``adapter.parts``, ..."""
    with double_as_pcdet() as pcdet:
        enable_cpu_mode()
        names = ('checkpoints', 'data', 'detector', 'parts', 'recipe', 'registries')
        found = {n: importlib.import_module(f'q3d_plugin.openpcdet.{n}') for n in names}
        found['parts'].register_parts()
        found['pcdet'] = pcdet
        for name in ('config', 'datasets', 'models'):
            found[f'pcdet_{name}'] = importlib.import_module(f'pcdet.{name}')
        yield types.SimpleNamespace(**found)


@pytest.fixture
def toy_set(tmp_path):
    """A data set of three training and two validation frames; its folder."""
    root = tmp_path / 'set' / 'v1.0-mini'
    root.mkdir(parents=True)
    for split, seeds in (('train', range(3)), ('val', range(10, 12))):
        infos = [{'token': f'{split}{s}', 'seed': s} for s in seeds]
        (root / f'{split}.json').write_text(json.dumps(infos))
    return root.parent


@pytest.fixture
def make(adapter, toy_set):
    """Builds a detector of the double: ``make(quant={...}, **changes of MODEL)``; float without ``quant``."""

    def build(quant=None, training=False, names=('BACKBONE_3D', 'BACKBONE_2D', 'DENSE_HEAD'), **changes):
        model_cfg, data_cfg = EasyDict(MODEL), EasyDict(DATA, DATA_PATH=str(toy_set))
        if quant is not None:
            model_cfg.QUANT = EasyDict(quant)
            for section in names:
                model_cfg[section].NAME = f'Quant{model_cfg[section].NAME}'
            model_cfg.NAME = 'QuantCenterPoint'
        for key, value in changes.items():
            model_cfg[key] = EasyDict(value) if isinstance(value, dict) else value
        dataset, _, _ = adapter.pcdet_datasets.build_dataloader(
            data_cfg, CLASSES, 1, False, workers=0, logger=logging.getLogger('double'), training=training
        )
        return randomize(adapter.pcdet_models.build_network(model_cfg, len(CLASSES), dataset)).eval()

    return build


@pytest.fixture
def run_logger(tmp_path):
    """A logger as OpenPCDet's scripts make it; its folder is ``tmp_path / 'run'``."""
    (tmp_path / 'run').mkdir()
    logger = logging.getLogger(f'pcdet-{uuid.uuid4().hex}')
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.FileHandler(tmp_path / 'run' / 'log_eval.txt'))
    yield logger
    for handler in logger.handlers:
        handler.close()


@pytest.fixture
def float_file(make, tmp_path):
    """A float checkpoint with random weights."""
    path = tmp_path / 'float.pth'
    torch.manual_seed(0)
    torch.save({'model_state': make().state_dict(), 'epoch': 3, 'it': 12, 'version': 'pcdet+0.6.0'}, path)
    return path


@pytest.fixture
def batch(adapter):
    """One batch of a detector's data set: ``batch(detector)``."""

    def first(detector, index=0):
        import numpy as np

        np.random.seed(0)
        frames = detector.dataset.collate_batch([detector.dataset[index]])
        adapter.pcdet_models.load_data_to_gpu(frames)
        return frames

    return first


@pytest.fixture
def outputs(batch):
    """The raw outputs of a detector for one frame, by name."""

    def forward(detector, index=0):
        with torch.no_grad():
            heads = detector.eval()(batch(detector, index))[0]
        return {f'{i}.{k}': v for i, head in enumerate(heads) for k, v in head.items()}

    return forward
