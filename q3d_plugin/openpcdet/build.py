"""Detectors of OpenPCDet outside of its scripts; see :mod:`q3d_plugin.adapter`.

:func:`q3d_plugin.openpcdet.register` has to be called before this module is imported.
"""

import contextlib
import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import pcdet
from easydict import EasyDict
from pcdet.config import cfg_from_list, cfg_from_yaml_file
from pcdet.datasets import DatasetTemplate, build_dataloader
from pcdet.models import build_network, load_data_to_gpu
from torch import Tensor, nn

from q3d_plugin.adapter import Adapter, copy_containers, without_keys
from q3d_plugin.errors import Q3DError
from q3d_plugin.frame import Frame
from q3d_plugin.openpcdet.frames import frame_item
from q3d_plugin.openpcdet.recipe import PATH, check_config_file, check_model_cfg
from q3d_plugin.openpcdet.registries import REGISTRIES, registry_of
from q3d_plugin.openpcdet.synthetic import synthetic_cameras
from q3d_plugin.recipe import Recipe
from q3d_plugin.synthetic import POINTS, synthetic_points

__all__ = ['OpenPCDet', 'tools_folder']


def tools_folder() -> Path:
    """The folder ``tools`` of OpenPCDet's checkout, which the paths in its configs are relative to."""
    for root in (Path(pcdet.__file__).resolve().parents[1], os.environ.get('OPENPCDET_ROOT')):
        if root and (Path(root).expanduser() / 'tools').is_dir():
            return (Path(root).expanduser() / 'tools').resolve()
    return Path.cwd()


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class OpenPCDet(Adapter):
    """OpenPCDet, the checkout that is registered."""

    name = 'openpcdet'
    recipe_path = PATH
    decoding = ('generate_predicted_boxes', 'get_bboxes')

    def __init__(self) -> None:
        self.folder = tools_folder() / 'cfgs'

    def configs(self) -> List[str]:
        if not self.folder.is_dir():
            raise Q3DError(
                f'configs of OpenPCDet: {str(self.folder.parent)!r} has no cfgs: name a checkout of OpenPCDet'
            )
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.glob('*_models/*.yaml'))

    def read(self, path: Path, options: Optional[Mapping[str, str]] = None) -> EasyDict:
        """As OpenPCDet's scripts read it, ``options`` as their ``--set``; ``DATA_PATH`` is absolute in it."""
        path, tools = Path(path).resolve(), tools_folder()
        with _working_in(tools):
            check_config_file(path)
            cfg = cfg_from_yaml_file(str(path), EasyDict(ROOT_DIR=tools.parent, LOCAL_RANK=0))
            flat = [part for key, value in (options or {}).items() for part in (key, value)]
            try:
                cfg_from_list(flat, cfg)
            except (AssertionError, KeyError, AttributeError) as error:
                raise Q3DError(f'--set: config {str(path)!r} has no such key: {error}') from error
            if cfg.DATA_CONFIG.get('DATA_PATH'):
                cfg.DATA_CONFIG.DATA_PATH = str(Path(cfg.DATA_CONFIG.DATA_PATH).expanduser().absolute())
        return cfg

    def recipe_of(self, cfg: EasyDict, path: Path) -> Recipe:
        recipe = check_model_cfg(cfg.MODEL)
        if recipe is None:
            raise Q3DError(f'config {str(path)!r} has no {PATH} and no Quant names: there is nothing to try')
        return recipe

    def float_config(self, cfg: EasyDict) -> EasyDict:
        cfg = copy.deepcopy(cfg)
        for section, part in _parts(cfg):
            if part.NAME.startswith('Quant') and part.NAME[5:] in registry_of(section):
                part.NAME = part.NAME[5:]
        cfg.MODEL.pop('QUANT', None)
        return cfg

    def quantized_config(self, cfg: EasyDict, recipe: Mapping[str, Any]) -> EasyDict:
        cfg = copy.deepcopy(cfg)
        for section, part in _parts(cfg):
            if f'Quant{part.NAME}' in registry_of(section):
                part.NAME = f'Quant{part.NAME}'
        cfg.MODEL.QUANT = EasyDict(_upper(recipe))
        return cfg

    def signature(self, cfg: EasyDict) -> str:
        data = cfg.DATA_CONFIG
        parts = (cfg.MODEL, data.POINT_CLOUD_RANGE, data.POINT_FEATURE_ENCODING, data.DATA_PROCESSOR)
        parts = (parts, cfg.CLASS_NAMES)
        return json.dumps(without_keys(parts, ('LOSS', 'TARGET_CONFIG')), sort_keys=True, default=str)

    def build(self, cfg: EasyDict, dataset: Any = None) -> nn.Module:
        """The model of a config.

        Args:
            cfg: As :meth:`read` gives it.
            dataset: The data set that the detector holds; one without frames where None. Then the model is
                built without the files that the config names: its weights stay random.
        """
        if dataset is None:
            cfg = _without_files(cfg)
            dataset = DatasetTemplate(
                cfg.DATA_CONFIG, cfg.CLASS_NAMES, training=False, root_path=Path('/nowhere')
            )
        with contextlib.suppress(ImportError):
            from pcdet.models.model_utils import mppnet_utils

            # MPPNet counts the layers that it ever made, so that a second one in a process is another model.
            mppnet_utils.TransformerEncoderLayer.count = 0
        with _working_in(tools_folder()):
            model = build_network(model_cfg=cfg.MODEL, num_class=len(cfg.CLASS_NAMES), dataset=dataset)
        model.eval()
        return model

    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        model._load_state_dict(state, strict=False)

    def prepare(self, model: nn.Module, batch: Any) -> Dict[str, Any]:
        load_data_to_gpu(batch)
        return batch

    def points_batch(self, model: nn.Module, points: np.ndarray) -> Dict[str, Any]:
        np.random.seed(0)  # the points are shuffled in testing too
        used = len(model.dataset.dataset_cfg.POINT_FEATURE_ENCODING.src_feature_list)
        item = model.dataset.prepare_data({'points': points[:, :used], 'frame_id': 'frame'})
        return self.prepare(model, model.dataset.collate_batch([item]))

    def reads_images(self, cfg: EasyDict) -> bool:
        return 'IMAGE_BACKBONE' in cfg.MODEL

    def camera_batch(self, cfg: EasyDict, model: nn.Module, frame: Frame) -> Dict[str, Any]:
        np.random.seed(0)  # the points are shuffled in testing too
        dataset, item = frame_item(cfg.DATA_CONFIG, list(cfg.CLASS_NAMES), frame)
        return dataset.collate_batch([item])

    def synthetic_batch(self, cfg: EasyDict, model: nn.Module) -> Dict[str, Any]:
        channels = len(cfg.DATA_CONFIG.POINT_FEATURE_ENCODING.src_feature_list)
        points = synthetic_points(cfg.DATA_CONFIG.POINT_CLOUD_RANGE, channels, POINTS)
        batch = self.points_batch(model, points)
        if self.reads_images(cfg):
            batch.update(synthetic_cameras(cfg.MODEL.VTRANSFORM.IMAGE_SIZE))
        return batch

    def voxels(self, batch: Any) -> Optional[int]:
        return len(batch['voxel_coords']) if 'voxel_coords' in batch else None

    def training_batch(self, cfg: EasyDict, model: nn.Module, root: Path) -> Dict[str, Any]:
        data = copy.deepcopy(cfg.DATA_CONFIG)
        data.DATA_PATH = str(root.expanduser().absolute())
        augmentor = data.get('DATA_AUGMENTOR', EasyDict())
        augmentor.DISABLE_AUG_LIST = [*augmentor.get('DISABLE_AUG_LIST', []), 'gt_sampling']
        np.random.seed(0)
        dataset, _, _ = build_dataloader(
            dataset_cfg=data,
            class_names=list(cfg.CLASS_NAMES),
            batch_size=1,
            dist=False,
            workers=0,
            logger=logging.getLogger('q3d_plugin.openpcdet'),
            training=True,
        )
        return self.prepare(model, dataset.collate_batch([dataset[0]]))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        model._q3d_ready = True
        # CenterPoint's heads number the classes of the boxes anew, in place.
        batch = {**copy_containers(batch), 'gt_boxes': batch['gt_boxes'].clone()}
        return model(batch)[0]['loss'].mean()

    def run(self, model: nn.Module, batch: Any) -> Any:
        # A quantized detector calibrates itself on its data set at its first forward, where it is not ready.
        model._q3d_ready = True
        return model(copy_containers(batch))


def _parts(cfg: EasyDict) -> Iterator[Tuple[str, EasyDict]]:
    """The sections of a model's config whose NAME is looked up in a registry; the detector comes first."""
    for section in REGISTRIES:
        part = cfg.MODEL if section == 'NAME' else cfg.MODEL.get(section)
        if part is not None:
            yield section, part


def _upper(value: Any) -> Any:
    return {k.upper(): _upper(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _without_files(cfg: EasyDict) -> EasyDict:
    """A copy of a config whose model can be built without pretrained weights and without images on disk."""
    cfg = copy.deepcopy(cfg)
    cfg.MODEL.get('IMAGE_BACKBONE', {}).pop('INIT_CFG', None)
    # Images are generated as tensors, after what would read and scale them.
    steps = cfg.DATA_CONFIG.get('DATA_PROCESSOR', [])
    cfg.DATA_CONFIG.DATA_PROCESSOR = [s for s in steps if not s.NAME.startswith('image_')]
    return cfg
