"""A detector of MMDetection3D with its data and metric; see :mod:`q3d_plugin.bench`."""

import copy
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Dict, Optional

import torch
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from mmengine.runner.checkpoint import _load_checkpoint, _load_checkpoint_to_model
from tqdm import tqdm

from q3d_plugin import checkpoints, lifecycle
from q3d_plugin.bench import Bench, Frames, quiet
from q3d_plugin.errors import Q3DError
from q3d_plugin.files import plain
from q3d_plugin.metrics import summarize
from q3d_plugin.mmdet3d.build import MMDet3D
from q3d_plugin.mmdet3d.checkpoints import check_checkpoint
from q3d_plugin.mmdet3d.data import calibration_loader
from q3d_plugin.recipe import CalibrationSpec, Recipe

__all__ = ['MMDet3DBench']


class MMDet3DBench(Bench):
    """A detector of MMDetection3D.

    Args:
        config: A config with Quant types and a QuantHook.
        checkpoint: Float or quantized.
        options: Dotted keys of the config to change.
        recipe: In place of the hook's.
    """

    framework = 'mmdet3d'

    def __init__(
        self,
        config: Path,
        checkpoint: str,
        options: Optional[Mapping[str, str]] = None,
        recipe: Optional[Recipe] = None,
    ) -> None:
        self.config, self.checkpoint = Path(config), Path(checkpoint)
        self.adapter = MMDet3D()
        self.cfg = self.adapter.read(self.config, options)
        self.recipe = recipe or self.adapter.recipe_of(self.cfg, self.config)
        self.logger = MMLogger.get_instance('q3d_plugin', log_level='WARNING')
        self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        self.model = self.adapter.build(self.cfg).to(self.device)
        lifecycle.configure(self.model, self.recipe)
        source = f'checkpoint {str(checkpoint)!r}'
        content = _load_checkpoint(str(checkpoint), map_location='cpu')
        state = check_checkpoint(content, self.model, self.recipe, source)
        self.quantized = checkpoints.is_quantized_checkpoint(state)
        with quiet():
            _load_checkpoint_to_model(self.model, content, strict=False, revise_keys=[(r'^module\.', '')])
        self.keep_float_state()
        dataset = (self.cfg.get('test_dataloader') or {}).get('dataset', {})
        self.classes = tuple(
            (dataset.get('metainfo') or {}).get('classes') or self.cfg.get('class_names', ())
        )
        self._test = None

    @property
    def second_stage(self) -> bool:
        return any(getattr(self.model, n, None) is not None for n in ('roi_head', 'pts_roi_head'))

    def frames_of_split(self, split: str, count: int, seed: int = 0) -> Frames:
        loader, _ = calibration_loader(self.cfg, CalibrationSpec(split, count, seed), self.logger)
        return Frames(loader, self.prepare_batch)

    @torch.no_grad()
    def evaluate(self, folder: Optional[Path] = None) -> Dict[str, Any]:
        if self._test is None:
            if self.cfg.get('test_dataloader') is None or self.cfg.get('test_evaluator') is None:
                raise Q3DError(f'config {str(self.config)!r} has no test_dataloader or no test_evaluator')
            loader = copy.deepcopy(self.cfg.test_dataloader)
            with quiet():
                self._test = Runner.build_dataloader(loader, seed=0)
        loader = self._test
        evaluator = Evaluator(copy.deepcopy(self.cfg.test_evaluator))
        evaluator.dataset_meta = getattr(loader.dataset, 'metainfo', None)
        with tempfile.TemporaryDirectory() as temporary, quiet():
            for metric in evaluator.metrics:
                if hasattr(metric, 'jsonfile_prefix'):
                    metric.jsonfile_prefix = os.path.join(str(folder or temporary), 'predictions')
            for batch in tqdm(loader, desc='evaluation', unit='frame', leave=False):
                outputs = self.model.test_step(batch)
                evaluator.process(data_samples=outputs, data_batch=batch)
            found = evaluator.evaluate(len(loader.dataset))
        return summarize(found)

    def settings(self) -> Dict[str, Any]:
        names = ('model', 'test_dataloader', 'test_evaluator', 'train_dataloader', 'test_cfg')
        return {name: plain(self.cfg.get(name)) for name in names}
