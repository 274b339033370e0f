"""The door to a detector of OpenPCDet for the analysis; see :mod:`q3d_plugin.bench`.

:func:`q3d_plugin.openpcdet.register` has to be called before this module is imported.
"""

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Dict, Optional

import numpy as np
import pcdet
import torch
from easydict import EasyDict
from pcdet.config import cfg_from_list, cfg_from_yaml_file
from pcdet.datasets import build_dataloader
from pcdet.models import build_network, load_data_to_gpu
from torch import Tensor
from tqdm import tqdm

from q3d_plugin import lifecycle
from q3d_plugin.bench import Bench, Frames, quiet, raw_outputs
from q3d_plugin.errors import Q3DError
from q3d_plugin.files import plain
from q3d_plugin.metrics import summarize
from q3d_plugin.openpcdet.data import calibration_loader
from q3d_plugin.openpcdet.recipe import PATH, check_config_file, check_model_cfg
from q3d_plugin.recipe import CalibrationSpec, Recipe

__all__ = ['OpenPCDetBench', 'tools_folder']

_DECODING = ('generate_predicted_boxes', 'get_bboxes')


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


def read_config(path: Path, options: Optional[Mapping[str, str]] = None) -> EasyDict:
    """The config with ``options`` merged, as OpenPCDet's ``--set`` does; ``DATA_PATH`` is absolute in it.

    Args:
        path: The file, which exists.
        options: Dotted keys and values as text.

    Raises:
        Q3DError: The file cannot be read, or does not go together.
    """
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
        self.cfg = read_config(self.config, options)
        given = check_model_cfg(self.cfg.MODEL)
        if given is None:
            raise Q3DError(
                f'config {str(config)!r} has no {PATH} and no Quant names: there is nothing to try'
            )
        self.recipe = given
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
        self.model = build_network(
            model_cfg=self.cfg.MODEL, num_class=len(self.cfg.CLASS_NAMES), dataset=self.dataset
        )
        if recipe is not None:
            self.configure(recipe)
        self.model.load_params_from_file(filename=str(self.checkpoint), logger=self.logger, to_cpu=True)
        self.model.cuda()
        self.model.eval()
        # The detector would calibrate by itself at its first forward pass.
        self.model._q3d_ready = True
        self.quantized = bool(lifecycle.quantizers(self.model)) and lifecycle.is_calibrated(self.model)
        self.keep_float_state()
        self._heads = [m for m in self.model.modules() if any(hasattr(m, n) for n in _DECODING)]

    @property
    def second_stage(self) -> bool:
        return any(getattr(self.model, n, None) is not None for n in ('roi_head', 'point_head'))

    def configure(self, recipe: Recipe) -> None:
        super().configure(recipe)
        self.model.quant_recipe = recipe

    def frames(self, split: str, count: int, seed: int = 0) -> Frames:
        loader, _ = calibration_loader(self.dataset, CalibrationSpec(split, count, seed), self.logger)
        return Frames(loader, self.prepare_batch)

    def prepare_batch(self, batch: Any) -> Any:
        """A batch of the loader with its arrays as tensors on the device."""
        load_data_to_gpu(batch)
        return batch

    @torch.no_grad()
    def run(self, batch: Any) -> Any:
        return self.model(dict(batch))

    def forward(self, batch: Any) -> Dict[str, Tensor]:
        return raw_outputs(self._heads, _DECODING, lambda: self.run(batch))

    @torch.no_grad()
    def evaluate(self, folder: Optional[Path] = None) -> Dict[str, Any]:
        np.random.seed(1024)  # the points are shuffled in testing too
        found, dataset = [], self._test.dataset
        with tempfile.TemporaryDirectory() as temporary, quiet():
            output = Path(folder or temporary).absolute() / 'predictions'
            output.mkdir(parents=True, exist_ok=True)
            for batch in tqdm(self._test, desc='evaluation', unit='frame', leave=False):
                load_data_to_gpu(batch)
                predictions, _ = self.model(batch)
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
