"""Detectors of MMDetection3D outside of its runner; see :mod:`q3d_plugin.adapter`."""

import contextlib
import copy
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Dict, List, Optional

import mmdet3d
import numpy as np
import torch
from mmdet3d.models.segmentors import EncoderDecoder3D
from mmdet3d.registry import MODELS
from mmdet3d.structures import Det3DDataSample, LiDARInstance3DBoxes
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor, nn

import q3d_plugin.mmdet3d  # noqa: F401  (registers the Quant types)
from q3d_plugin import checkpoints
from q3d_plugin.adapter import Adapter, copy_containers, without_keys
from q3d_plugin.errors import Q3DError
from q3d_plugin.frame import Frame
from q3d_plugin.mmdet3d.frames import frame_inputs, packed_keys
from q3d_plugin.mmdet3d.quant_types import put_quant_types, take_quant_types
from q3d_plugin.mmdet3d.synthetic import synthetic_frame
from q3d_plugin.recipe import Recipe

__all__ = ['MMDet3D']


class MMDet3D(Adapter):
    """MMDetection3D.

    Args:
        folder: Of the configs that :meth:`configs` lists; those of the installed wheel where None.
    """

    name = 'mmdet3d'
    decoding = ('predict_by_feat',)

    def __init__(self, folder: Optional[str] = None) -> None:
        self.folder = Path(folder or Path(mmdet3d.__file__).parent / '.mim' / 'configs')

    def configs(self) -> List[str]:
        if not self.folder.is_dir():
            raise Q3DError(f'configs of MMDetection3D: {str(self.folder)!r} is not a folder')
        found = (p.relative_to(self.folder) for p in self.folder.rglob('*.py'))
        # Those below _base_ are there to be inherited from.
        return sorted(str(p) for p in found if not any(part.startswith('_') for part in p.parts))

    def read(self, path: Path, options: Optional[Mapping[str, str]] = None) -> Config:
        try:
            config = Config.fromfile(str(path))
            values = {k: DictAction._parse_iterable(v) for k, v in (options or {}).items()}
            config.merge_from_dict(values)
        except Exception as error:  # whatever a Python file can raise
            first = (str(error).splitlines() or [''])[0]
            raise Q3DError(f'config {str(path)!r} cannot be read: {type(error).__name__}: {first}') from error
        if 'model' not in config:
            raise Q3DError(f'config {str(path)!r} has no model')
        return config

    def recipe_of(self, cfg: Config, path: Path) -> Recipe:
        hooks = [h for h in cfg.get('custom_hooks') or [] if h.get('type') == 'QuantHook']
        if not hooks:
            raise Q3DError(
                f'config {str(path)!r} has no QuantHook: custom_hooks = [dict(type="QuantHook", '
                'recipe=dict(...))] would work'
            )
        given = hooks[0].get('recipe')
        return Recipe.from_dict(given.to_dict() if isinstance(given, ConfigDict) else given)

    def float_config(self, cfg: Config) -> Config:
        cfg = copy.deepcopy(cfg)
        take_quant_types(cfg.model)
        cfg.custom_hooks = [h for h in cfg.get('custom_hooks') or [] if h.get('type') != 'QuantHook']
        return cfg

    def quantized_config(self, cfg: Config, recipe: Mapping[str, Any]) -> Config:
        cfg = copy.deepcopy(cfg)
        put_quant_types(cfg.model)
        hook = dict(type='QuantHook', recipe=copy.deepcopy(dict(recipe)))
        cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), hook]
        return cfg

    def signature(self, cfg: Config) -> str:
        parts = (cfg.model.to_dict(), cfg.get('test_pipeline'), cfg.get('point_cloud_range'))
        # Of one stage, test_cfg says how boxes are suppressed in the end; else which go into the second one.
        other = ('train_cfg', 'init_cfg', 'loss') + (() if 'roi_head' in cfg.model else ('test_cfg',))
        return json.dumps(without_keys(parts, other), sort_keys=True, default=str)

    def build(self, cfg: Config) -> nn.Module:
        init_default_scope(cfg.get('default_scope', 'mmdet3d'))
        # BEVFusion would fetch weights of its image backbone; who builds a model here has others.
        with _few_words():
            model = MODELS.build(_without_pretrained(cfg.model))
        # Not in one line: ImVoteNet's train() returns nothing.
        model.eval()
        return model

    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        checkpoints.check_state_dict(model, state)
        load_state_dict(model, state, strict=True)

    def prepare(self, model: nn.Module, batch: Any) -> Dict[str, Any]:
        return model.data_preprocessor(batch, False)

    def points_batch(self, model: nn.Module, points: np.ndarray) -> Dict[str, Any]:
        # Points of a LiDAR; TransFusion's head asks the frame for the type of its boxes.
        sample = Det3DDataSample(metainfo=dict(box_type_3d=LiDARInstance3DBoxes))
        inputs = {'points': [torch.from_numpy(points)]}
        return self.prepare(model, {'inputs': inputs, 'data_samples': [sample]})

    def reads_images(self, cfg: Config) -> bool:
        return 'img' in packed_keys(cfg)

    def camera_batch(self, cfg: Config, model: nn.Module, frame: Frame) -> Dict[str, Any]:
        return frame_inputs(cfg, frame)

    def synthetic_batch(self, cfg: Config, model: nn.Module) -> Dict[str, Any]:
        return self.prepare(model, synthetic_frame(cfg, model))

    def voxels(self, batch: Any) -> Optional[int]:
        voxels = batch['inputs'].get('voxels')
        return None if voxels is None else len(voxels['coors'])

    def training_batch(self, cfg: Config, model: nn.Module, root: Path) -> Dict[str, Any]:
        init_default_scope(cfg.get('default_scope', 'mmdet3d'))
        source = cfg.train_dataloader.dataset
        while 'dataset' in source:  # CBGSDataset, RepeatDataset and the like
            source = source.dataset
        dataset = copy.deepcopy(source)
        dataset.data_root = str(root)
        dataset.pipeline = [step for step in dataset.pipeline if step.type != 'ObjectSample']
        loader = dict(
            batch_size=1,
            num_workers=0,
            dataset=dataset,
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='pseudo_collate'),
        )
        return model.data_preprocessor(next(iter(Runner.build_dataloader(loader, seed=0))), True)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model.parse_losses(model(**copy_containers(batch), mode='loss'))[0]

    def run(self, model: nn.Module, batch: Any) -> Any:
        # This class, unlike those derived from it, predicts by votes over windows that slide over the frame.
        mode = 'tensor' if type(model) is EncoderDecoder3D else 'predict'
        return model(**copy_containers(batch), mode=mode)


@contextlib.contextmanager
def _few_words() -> Iterator[None]:
    """Within, MMEngine logs warnings alone: backbones list all parameters that they initialize."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


def _without_pretrained(node: Any) -> Any:
    """A copy of a model's config without the files that its parts would be initialized with."""
    if isinstance(node, (list, tuple)):
        return type(node)(_without_pretrained(v) for v in node)
    if not isinstance(node, Mapping):
        return node
    kept = {k: v for k, v in node.items() if k != 'init_cfg' or not _is_pretrained(v)}
    return type(node)({k: _without_pretrained(v) for k, v in kept.items()})


def _is_pretrained(init_cfg: Any) -> bool:
    return isinstance(init_cfg, Mapping) and init_cfg.get('type') == 'Pretrained'
