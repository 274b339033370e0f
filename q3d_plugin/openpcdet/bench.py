"""A detector of OpenPCDet with its data and metric; see :mod:`q3d_plugin.bench`.

:func:`q3d_plugin.openpcdet.register` has to be called before this module is imported.
"""

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Dict, Optional

import numpy as np
import torch
from pcdet.datasets import build_dataloader
from tqdm import tqdm

from q3d_plugin import lifecycle
from q3d_plugin.bench import Bench, Frames, quiet
from q3d_plugin.files import plain
from q3d_plugin.metrics import summarize
from q3d_plugin.openpcdet.build import OpenPCDet
from q3d_plugin.openpcdet.data import calibration_loader
from q3d_plugin.openpcdet.recipe import PATH
from q3d_plugin.recipe import CalibrationSpec, Recipe

__all__ = ['OpenPCDetBench']


class OpenPCDetBench(Bench):
    """A detector of OpenPCDet.

    Args:
        config: A config with Quant types and ``MODEL.QUANT``.
        checkpoint: Float or quantized.
        options: Dotted keys of the config to change.
        recipe: In place of the config's.
    """

    framework = 'openpcdet'
    recipe_path = PATH

    def __init__(
        self,
        config: Path,
        checkpoint: str,
        options: Optional[Mapping[str, str]] = None,
        recipe: Optional[Recipe] = None,
    ) -> None:
        self.config, self.checkpoint = Path(config), Path(checkpoint).expanduser().absolute()
        self.adapter = OpenPCDet()
        self.cfg = self.adapter.read(self.config, options)
        self.recipe = self.adapter.recipe_of(self.cfg, config)
        self.logger = logging.getLogger('q3d_plugin.openpcdet')
        self.classes = tuple(self.cfg.CLASS_NAMES)
        np.random.seed(1024)  # as OpenPCDet's own test script does
        with quiet():
            self.dataset, self._test, _ = build_dataloader(
                dataset_cfg=self.cfg.DATA_CONFIG,
                class_names=list(self.cfg.CLASS_NAMES),
                batch_size=1,
                dist=False,
                workers=2 if torch.cuda.is_available() else 0,
                logger=self.logger,
                training=False,
            )
        self.model = self.adapter.build(self.cfg, self.dataset)
        if recipe is not None:
            self.configure(recipe)
        self.model.load_params_from_file(filename=str(self.checkpoint), logger=self.logger, to_cpu=True)
        self.model.cuda()
        # The detector would calibrate by itself at its first forward pass.
        self.model._q3d_ready = True
        self.quantized = bool(lifecycle.quantizers(self.model)) and lifecycle.is_calibrated(self.model)
        self.keep_float_state()

    @property
    def second_stage(self) -> bool:
        return any(getattr(self.model, n, None) is not None for n in ('roi_head', 'point_head'))

    def configure(self, recipe: Recipe) -> None:
        super().configure(recipe)
        self.model.quant_recipe = recipe

    def frames_of_split(self, split: str, count: int, seed: int = 0) -> Frames:
        loader, _ = calibration_loader(self.dataset, CalibrationSpec(split, count, seed), self.logger)
        return Frames(loader, self.prepare_batch)

    @torch.no_grad()
    def evaluate(self, folder: Optional[Path] = None) -> Dict[str, Any]:
        np.random.seed(1024)  # the points are shuffled in testing too
        found, dataset = [], self._test.dataset
        with tempfile.TemporaryDirectory() as temporary, quiet():
            output = Path(folder or temporary).absolute() / 'predictions'
            output.mkdir(parents=True, exist_ok=True)
            for batch in tqdm(self._test, desc='evaluation', unit='frame', leave=False):
                predictions, _ = self.model(self.adapter.prepare(self.model, batch))
                found += dataset.generate_prediction_dicts(batch, predictions, dataset.class_names)
            _, result = dataset.evaluation(
                found,
                dataset.class_names,
                eval_metric=self.cfg.MODEL.POST_PROCESSING.EVAL_METRIC,
                output_path=str(output),
            )
            # OpenPCDet drops the classes of the devkit's summary, which lies beside the detections.
            summary = output / 'metrics_summary.json'
            per_class = json.loads(summary.read_text())['mean_dist_aps'] if summary.is_file() else {}
        return summarize(result, per_class)

    def settings(self) -> Dict[str, Any]:
        model = {k: v for k, v in self.cfg.MODEL.items() if k != 'QUANT'}
        return {'MODEL': plain(model), 'DATA_CONFIG': plain(self.cfg.DATA_CONFIG)}
