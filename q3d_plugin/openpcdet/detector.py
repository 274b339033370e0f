"""The life of a quantized detector as OpenPCDet's scripts run it: without hooks, the detector itself acts.

``tools/test.py`` builds the detector, calls ``load_params_from_file`` and then the detector, batch by batch;
``tools/train.py`` builds the optimizer in between, resumes by ``load_params_with_optimizer``, and then calls
``train()`` before it gives the detector to DistributedDataParallel.
"""

import contextlib
import logging
import os
import random
import time
from pathlib import Path
from typing import Any, Dict, Optional

import numpy as np
import torch
import torch.distributed as dist
from pcdet.models import load_data_to_gpu
from pcdet.utils.spconv_utils import find_all_spconv_keys

from q3d_plugin import checkpoints, lifecycle, safe_load
from q3d_plugin.checkpoint_file import check_checkpoint_file
from q3d_plugin.coverage import coverage, coverage_table
from q3d_plugin.errors import Q3DError, near_matches
from q3d_plugin.openpcdet.checkpoints import pack_recipe, read_checkpoint, unpack_recipe
from q3d_plugin.openpcdet.data import calibration_loader, frame_name, rank_and_world
from q3d_plugin.openpcdet.distillation import known_outputs
from q3d_plugin.openpcdet.recipe import PATH, check_model_cfg
from q3d_plugin.openpcdet.training import STEPS_KEY, DetectorTraining
from q3d_plugin.progress import with_progress
from q3d_plugin.run_record import write_run
from q3d_plugin.trained_range import LOG2_KEY
from q3d_plugin.training.distillation import check_distillation
from q3d_plugin.training.norms import revive_norms, revive_norms_of

__all__ = ['QuantDetectorMixin']

RECIPE_KEY = 'q3d_recipe'
"""The buffer of a quantized detector, and so the key of its checkpoints, that holds the recipe."""


class QuantDetectorMixin:
    """Stands before a detector class of OpenPCDet and quantizes it by the recipe under ``MODEL.QUANT``.

    - At build it gives the Quant parts their quantizers.
    - A float checkpoint is checked, its BatchNorms are folded, and what does not fit is an error.
    - At the first forward pass after that it calibrates (the detector is on its device by then), logs which
      layer is quantized how, and saves ``quantized.pth`` and ``coverage.json`` beside OpenPCDet's log.
    - In training that comes earlier, in ``train()``: learned ranges are parameters from then on, and
      DistributedDataParallel has to know them.
    - A quantized checkpoint, also one from training, is recognised, and nothing is calibrated.

    Args:
        model_cfg: ``MODEL`` of the config.
        num_class: Number of classes.
        dataset: The data set; calibration makes another one from its config.
    """

    _q3d_source: Optional[str] = None

    def __init__(self, model_cfg, num_class, dataset):
        recipe = check_model_cfg(model_cfg)
        super().__init__(model_cfg=model_cfg, num_class=num_class, dataset=dataset)
        self.quant_recipe = recipe
        self._q3d_refused = ''
        self._q3d_ready = self._q3d_prepared = False
        self._q3d_training: Optional[DetectorTraining] = None
        self._q3d_saved = set()
        self._q3d_teacher = ''
        self._q3d_logger = getattr(dataset, 'logger', None) or logging.getLogger('q3d_plugin')
        if recipe.mode == 'qat':
            check_distillation(recipe, known_outputs(self), type(getattr(self, 'dense_head', None)).__name__)
        lifecycle.configure(self, recipe, self._q3d_logger)
        self.register_buffer(RECIPE_KEY, pack_recipe(recipe))
        self.register_buffer(STEPS_KEY, torch.zeros((), dtype=torch.int64))

    def _q3d_note_recipe(self) -> None:
        packed = pack_recipe(self.quant_recipe, self, self._q3d_teacher)
        self._buffers[RECIPE_KEY] = packed.to(self._buffers[RECIPE_KEY].device)

    # Loading.

    def load_params_from_file(self, filename, logger, to_cpu=False, pre_trained_path=None):
        """Loads a float or a quantized checkpoint, for testing or as the start of training.

        Args:
            filename: The checkpoint.
            logger: OpenPCDet's logger; its folder is where ``quantized.pth`` will be written.
            to_cpu: Taken for OpenPCDet's sake: checkpoints are always read on the CPU.
            pre_trained_path: A second checkpoint, whose weights win.

        Raises:
            Q3DError: A file is missing or damaged, or does not fit.
        """
        self._q3d_logger = logger or self._q3d_logger
        with self._q3d_loading(filename) as source:
            checkpoint = read_checkpoint(filename, source)
            state = dict(checkpoint['model_state'])
            if pre_trained_path is not None:
                more = read_checkpoint(pre_trained_path, f'checkpoint {str(pre_trained_path)!r}')[
                    'model_state'
                ]
                if checkpoints.is_quantized_checkpoint(more) != checkpoints.is_quantized_checkpoint(state):
                    raise Q3DError(
                        f'{source} and {str(pre_trained_path)!r}: one is quantized and the other float, so '
                        'the ranges of one would go with weights of the other'
                    )
                state.update(more)
            version = checkpoint.get('version')
            self._q3d_logger.info(
                f'==> Loading parameters from {source}' + (f', trained from {version}' if version else '')
            )
            _, loaded = self._load_state_dict(state, strict=False)
            self._q3d_logger.info(f'==> Done (loaded {len(loaded)} entries)')

    def load_params_with_optimizer(self, filename, to_cpu=False, optimizer=None, logger=None):
        """Resumes a quantized training.

        Args:
            filename: A checkpoint of that training.
            to_cpu: Taken for OpenPCDet's sake: checkpoints are always read on the CPU.
            optimizer: Gets its state back.
            logger: OpenPCDet's logger.

        Returns:
            tuple: Iterations and epochs done.

        Raises:
            Q3DError: As :meth:`load_params_from_file`; or the checkpoint is float, or of a training by
                another recipe.
        """
        self._q3d_logger = logger or self._q3d_logger
        with self._q3d_loading(filename) as source:
            checkpoint = read_checkpoint(filename, source)
            if not checkpoints.is_quantized_checkpoint(checkpoint['model_state']):
                raise Q3DError(
                    f'{source}: a quantized training cannot resume from a float checkpoint, whose optimizer '
                    'had other parameters; start from it with --pretrained_model'
                )
            self._q3d_logger.info(f'==> Loading parameters from {source}')
            self._q3d_resume(checkpoint, source, optimizer)
            if optimizer is not None:
                state = checkpoint.get('optimizer_state')
                beside = Path(filename).with_name(f'{Path(filename).stem}_optim{Path(filename).suffix}')
                if state is None and beside.is_file():
                    check_checkpoint_file(str(beside))
                    state = safe_load.load(str(beside))['optimizer_state']
                if state is not None:
                    optimizer.load_state_dict(state)
            self._q3d_logger.info('==> Done')
            return checkpoint.get('it', 0.0), checkpoint.get('epoch', -1)

    @contextlib.contextmanager
    def _q3d_loading(self, filename):
        source = f'checkpoint {str(filename)!r}'
        self._q3d_source, self._q3d_refused = str(filename), ''
        try:
            yield source
        except Exception as error:
            # tools/train.py goes on to older checkpoints of the run, in the end to none, whatever the error.
            known = isinstance(error, Q3DError)
            self._q3d_source = None
            self._q3d_refused = str(error) if known else f'{source}: {type(error).__name__}: {error}'
            self._q3d_logger.error(f'QuantDetector: {self._q3d_refused}')
            raise

    def _load_state_dict(self, model_state_disk, *, strict=True):
        """OpenPCDet's own way of loading, given a state that fits: it drops what has no place, silently."""
        source = f'checkpoint {self._q3d_source!r}' if self._q3d_source else 'checkpoint'
        self._q3d_end_training()
        # Whatever was trained before, a training that starts from here is at its beginning.
        state = self._q3d_fitted(model_state_disk, source, steps=0)
        if not checkpoints.is_quantized_checkpoint(model_state_disk):
            lifecycle.configure(self, self.quant_recipe)
        self._q3d_ready = self._q3d_prepared = False
        return super()._load_state_dict(state, strict=strict)

    def _q3d_resume(self, checkpoint: Dict[str, Any], source: str, optimizer: Any) -> None:
        given = checkpoint['model_state']
        self._q3d_end_training()
        if self.quant_recipe.mode == 'qat':
            meta = unpack_recipe(given.get(RECIPE_KEY))
            checkpoints.check_training_of(meta, self.quant_recipe, source)
            distillation = self.quant_recipe.training.distillation
            if distillation is not None and not distillation.teacher:
                self._q3d_teacher = checkpoints.teacher_of(meta, self.quant_recipe, source)
        # Before steps were counted here, OpenPCDet's own count of iterations tells them.
        steps = int(given.get(STEPS_KEY, checkpoint.get('it') or 0))
        if self.quant_recipe.mode == 'qat':
            revive_norms_of(self, given)
        state = self._q3d_fitted(given, source, steps)
        if self.quant_recipe.mode == 'qat':
            # Model and optimizer need their learned ranges before those are loaded.
            checkpoints.load_quantizers(self, state)
            self._q3d_training = DetectorTraining(self, self.quant_recipe, optimizer, self._q3d_teacher)
        self._q3d_ready = self._q3d_prepared = False
        super()._load_state_dict(state, strict=True)

    def _q3d_end_training(self) -> None:
        if self._q3d_training is not None:
            self._q3d_training.end()
            self._q3d_training = None

    def _q3d_fitted(self, given, source: str, steps: int) -> Dict[str, Any]:
        """The state of a checkpoint as it goes into this model; everything of it has its place there."""
        state = {**given, STEPS_KEY: torch.tensor(steps)}
        recipe = unpack_recipe(state.pop(RECIPE_KEY, None))
        if checkpoints.is_quantized_checkpoint(state):
            checkpoints.check_recipe_of(recipe, state, self, self.quant_recipe, source)
            checkpoints.restore_sharing(recipe, self)
            self._q3d_note_recipe()
        mine = self.state_dict()
        self._q3d_permute(state, mine)
        # The recipe of this run is the one that goes on; and early checkpoints do not count steps.
        state[RECIPE_KEY] = mine[RECIPE_KEY]
        if 'global_step' in mine:
            state.setdefault('global_step', mine['global_step'])
        folded = checkpoints.check_state_dict(self, state, source)
        # Whether the logarithms of learned ranges have a place depends on what the model is used for.
        over = [k for k in folded if k not in mine and not k.endswith(LOG2_KEY)]
        if over:
            near = near_matches(over[0], [k for k in mine if k not in state], 1)
            raise Q3DError(
                f'{source}: of another model: {over[0]!r} has no place in this one (nor have '
                f'{len(over) - 1} more of its {len(given)} entries)' + (near if '; did' in near else '')
            )
        return folded

    def _q3d_permute(self, state: Dict[str, Any], mine: Dict[str, Any]) -> None:
        """Weights of spconv 1.x in the layout of 2.x, by OpenPCDet's rule, before BatchNorm is folded."""
        for key in find_all_spconv_keys(self):
            weight = state.get(key)
            if weight is None or key not in mine or weight.shape == mine[key].shape:
                continue
            # (k, k, k, in, out) as (k, k, k, out, in), which is native in 2.x, or as (out, k, k, k, in).
            last = weight.dim() - 1
            for order in ((*range(last - 1), last, last - 1), (last, *range(last))):
                if weight.permute(order).shape == mine[key].shape:
                    state[key] = weight.permute(order).contiguous()
                    break

    # Running.

    def train(self, mode: bool = True):
        """As everywhere; in quantization-aware training a detector with a checkpoint gets its ranges here.

        Args:
            mode: Whether it trains.

        Raises:
            Q3DError: It cannot be calibrated.
        """
        super().train(mode)
        # Without a checkpoint nothing is wrong yet: the first forward pass will say so. Before it is on its
        # device it cannot be calibrated.
        loaded = mode and self._q3d_source is not None and self.quant_recipe.mode == 'qat'
        if loaded and (_device_type(self) != 'cpu' or not torch.cuda.is_available()):
            self._q3d_prepare()
        return self

    def forward(self, batch_dict):
        """OpenPCDet's forward pass, of a model that is calibrated first where it has no ranges yet."""
        if self.training and self.quant_recipe.mode != 'qat':
            raise Q3DError(f"{PATH}.MODE: {self.quant_recipe.mode!r} does not train; 'qat' would work")
        late = self._q3d_training is None
        self._q3d_prepare()
        if self.training and self._q3d_training is not None:
            if late:
                self._q3d_training.check_not_wrapped()
            self._q3d_training.before_step(batch_dict['batch_size'])
        if not self.training or self._q3d_training is None:
            return super().forward(batch_dict)
        out = self._q3d_training.forward(batch_dict, super().forward)
        shown = self._q3d_training.scalars(out[1], _folder_of(self._q3d_logger), self._q3d_logger)
        out[1].update(shown)
        return out

    def _q3d_prepare(self) -> None:
        """Gives the detector its ranges, and in training what else training needs, unless that is done."""
        if not self._q3d_ready:
            self._q3d_get_ranges()
            self._q3d_report()
            self._q3d_ready = self._q3d_prepared = True
        # Whoever gave it ranges by hand trains it by hand, too.
        if self.training and self._q3d_training is None and self._q3d_prepared:
            if self.quant_recipe.training.batch_norm == 'kept':
                self._q3d_revive_norms()
            self._q3d_training = DetectorTraining(self, self.quant_recipe)

    def _q3d_get_ranges(self) -> None:
        recipe, logger = self.quant_recipe, self._q3d_logger
        if recipe.mode == 'float':
            logger.info(f'QuantDetector: {PATH}.MODE is float, every quantizer is off')
        elif lifecycle.is_calibrated(self) and not (self.training and self._q3d_refused):
            logger.info('QuantDetector: the checkpoint is quantized, its ranges are used')
        elif self._q3d_source is None:
            raise Q3DError(
                'there is no checkpoint to quantize: give a trained float checkpoint by '
                + ('--pretrained_model' if self.training else '--ckpt')
                + (f' (one was refused: {self._q3d_refused})' if self._q3d_refused else '')
            )
        else:
            self._q3d_calibrate()

    def _q3d_frames(self):
        """The frames of calibration: their loader, their number, and the forward pass for each batch."""

        def forward(batch):
            load_data_to_gpu(batch)
            return super(QuantDetectorMixin, self).forward(batch)

        return *calibration_loader(self.dataset, self.quant_recipe.calibration, self._q3d_logger), forward

    def _q3d_revive_norms(self) -> None:
        with _random_state_kept(), torch.autocast(_device_type(self), enabled=False):
            loader, frames, forward = self._q3d_frames()
            count = revive_norms(self, loader, forward)
        self._q3d_logger.info(f'QuantDetector: {count} BatchNorms are back, by {frames} frames')

    def _q3d_calibrate(self) -> None:
        spec, logger = self.quant_recipe.calibration, self._q3d_logger
        start = time.time()
        # What the run that follows draws must not depend on whether calibration came before it.
        with _random_state_kept(), torch.autocast(_device_type(self), enabled=False):
            loader, frames, forward = self._q3d_frames()
            logger.info(
                f'QuantDetector: calibrating on {frames} frames of the {spec.split} split, seed {spec.seed}'
            )
            batches = with_progress(loader, logger, 'QuantDetector')
            seen = lifecycle.calibrate(self, batches, forward, names=frame_name, logger=logger)
            self._q3d_note_recipe()
        logger.info(f'QuantDetector: calibrated on {seen} frames in {time.time() - start:.1f} s')
        folder = _folder_of(logger)
        if folder is not None:
            name = 'quantized.pth'
            if self._q3d_saved:
                # --eval_all: one run tests several float checkpoints.
                name = f'quantized_{Path(self._q3d_source).stem}.pth'
            path = os.path.join(folder, name)
            self._q3d_saved.add(path)
            if rank_and_world()[0] == 0:
                checkpoints.save_checkpoint(self, self.quant_recipe, path, state_key='model_state')
                logger.info(f'QuantDetector: quantized checkpoint saved as {path}')
            self._q3d_teacher = os.path.abspath(path)
            self._q3d_note_recipe()
        else:
            logger.warning('QuantDetector: the log goes to no file, so no folder for quantized.pth is known')
        if rank_and_world()[1] > 1:
            dist.barrier()

    def _q3d_report(self) -> None:
        rows = coverage(self)
        self._q3d_logger.info('QuantDetector: coverage\n' + coverage_table(rows))
        folder = _folder_of(self._q3d_logger)
        if folder is not None and rank_and_world()[0] == 0:
            dataset = self.dataset
            facts = {
                'framework': 'openpcdet',
                'checkpoint': self._q3d_source,
                'data_root': str(Path(getattr(dataset, 'root_path', '.')).absolute()),
                'dataset_version': dataset.dataset_cfg.get('VERSION'),
            }
            write_run(folder, self, self.quant_recipe, facts)


def _folder_of(logger: logging.Logger) -> Optional[str]:
    """The folder that OpenPCDet's log is written to: that of the run. None where there is no log file."""
    files = [h.baseFilename for h in logger.handlers if isinstance(h, logging.FileHandler)]
    return os.path.dirname(files[-1]) if files else None


def _device_type(model: torch.nn.Module) -> str:
    return next(model.parameters()).device.type


@contextlib.contextmanager
def _random_state_kept():
    """Gives back the state of all random numbers as it was."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
