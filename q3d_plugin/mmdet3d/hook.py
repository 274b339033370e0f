"""QuantHook: from a float checkpoint to a quantized model, at the points where MMEngine lets a hook in."""

import os
import time
from pathlib import Path
from typing import Dict, Optional

from mmengine.dist import barrier, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS

from q3d_plugin import checkpoints, lifecycle
from q3d_plugin.checkpoint_file import check_checkpoint_file
from q3d_plugin.coverage import coverage, coverage_table
from q3d_plugin.errors import Q3DError
from q3d_plugin.files import check_writable, plain, write_text
from q3d_plugin.mmdet3d.checkpoints import check_checkpoint
from q3d_plugin.mmdet3d.data import calibration_loader, frame_name
from q3d_plugin.mmdet3d.distillation import attach_teacher, head_of, known_outputs, load_teacher
from q3d_plugin.mmdet3d.record import RunRecord
from q3d_plugin.progress import with_progress
from q3d_plugin.recipe import Recipe
from q3d_plugin.run_record import write_run
from q3d_plugin.training import QuantTraining
from q3d_plugin.training.distillation import check_distillation, frozen_copy
from q3d_plugin.training.norms import revive_norms, revive_norms_of

__all__ = ['QuantHook']


@HOOKS.register_module()
class QuantHook(Hook):
    """Quantizes the Quant types of a model by a recipe, in ``tools/test.py`` and ``tools/train.py``.

    The hook gives the model its quantizers before a checkpoint is loaded, checks that the checkpoint belongs
    to the model, calibrates once it is loaded (unless it was saved quantized), logs which layer is quantized
    how, and saves the quantized checkpoint as ``quantized.pth`` in the folder of the run. ``last_quantized``
    in the work dir names that file.

    Note:
        - The hook runs before EMAHook, so that the averaged model has the same quantizers.
        - Training needs ``mode='qat'`` and a checkpoint to start from.

    Args:
        recipe (dict): What to quantize and how; see :class:`q3d_plugin.recipe.Recipe`.
        save (bool): Whether to save the quantized checkpoint after calibration. Defaults to True.
    """

    priority = 'HIGH'

    def __init__(self, recipe: Optional[Dict] = None, save: bool = True) -> None:
        self.recipe = Recipe.from_dict(recipe)
        self.save = save
        self._source = 'checkpoint'
        self._training: Optional[QuantTraining] = None
        self._teacher = ''
        self._record: Optional[RunRecord] = None

    @staticmethod
    def _model(runner):
        model = runner.model
        return model.module if is_model_wrapper(model) else model

    def before_run(self, runner) -> None:
        """Gives the model its quantizers, and looks at the checkpoint file before anything long begins.

        Args:
            runner (Runner): The runner of the training, validation or testing process.
        """
        check_writable(Path(runner.work_dir))
        if runner._load_from is not None:
            self._source = f'checkpoint {str(runner._load_from)!r}'
            check_checkpoint_file(runner._load_from)
        model = self._model(runner)
        if self.recipe.mode == 'qat':
            check_distillation(self.recipe, known_outputs(model), type(head_of(model)).__name__)
        lifecycle.configure(model, self.recipe, runner.logger)

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Checks that the checkpoint belongs to this model and, if it is quantized, to this recipe.

        Args:
            runner (Runner): The runner.
            checkpoint (dict): As read from the file, before it goes into the model.
        """
        if runner._resume and self.recipe.mode == 'qat':
            checkpoints.check_training_of(checkpoint.get('meta'), self.recipe, self._source)
        state = check_checkpoint(checkpoint, self._model(runner), self.recipe, self._source)
        if runner._resume and self.recipe.mode == 'qat':
            # The optimizer is loaded next, and has to have the learned ranges by then.
            checkpoints.load_quantizers(self._model(runner), state)
            revive_norms_of(self._model(runner), state)
            self._start_training(runner, checkpoint.get('meta'))

    def before_train(self, runner) -> None:
        """Calibrates the model that training starts from.

        Args:
            runner (Runner): The runner of the training process.
        """
        if self.recipe.mode != 'qat':
            raise Q3DError(f"recipe.mode: {self.recipe.mode!r} does not train; 'qat' would work")
        if runner._load_from is None and not runner._resume:
            raise Q3DError(
                'load_from: quantization-aware training starts from a trained float checkpoint, and none is '
                "given; load_from = 'float.pth' in the config would work"
            )
        self._ensure_calibrated(runner)
        if self._training is None:
            self._start_training(runner)
        self._record = RunRecord(runner, self._training)

    def _start_training(self, runner, resumed: Optional[Dict] = None) -> None:
        model, distillation = self._model(runner), self.recipe.training.distillation
        teacher = None if distillation is None else self._make_teacher(model, resumed)
        if self.recipe.training.batch_norm == 'kept' and resumed is None:
            loader, frames = calibration_loader(runner.cfg, self.recipe.calibration, runner.logger)
            count = revive_norms(model, loader, runner.model.test_step)
            runner.logger.info(f'QuantHook: {count} BatchNorms are back, by {frames} frames')
        self._training = QuantTraining(model, self.recipe)
        self._spread_parameters(runner, model)
        if teacher is not None:
            attach_teacher(model, teacher, distillation)

    def _make_teacher(self, model, resumed: Optional[Dict]):
        """The teacher: a copy of the model as it is or, after a resume, as it was at the start."""
        teacher, given = frozen_copy(model), self.recipe.training.distillation.teacher
        if resumed is not None and not given:
            self._teacher = checkpoints.teacher_of(resumed, self.recipe, self._source)
        if resumed is not None or given:
            load_teacher(teacher, given or self._teacher)
        return teacher

    def _spread_parameters(self, runner, model) -> None:
        """Has wrapper, optimizer and averaged copies know ranges that are parameters from now on."""
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                hook.before_run(runner)  # makes its copy anew
        if not self._training.added:
            return
        if is_model_wrapper(runner.model):
            # It knows the parameters that there were when it was made. It goes first, with its hooks.
            runner.model = model
            runner.model = runner.wrap_model(runner.cfg.get('model_wrapper_cfg'), model)
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, OptimWrapperDict):
            wrapper = next(iter(wrapper.values()))
        # Schedules were built before, and count the groups.
        self._training.add_to(wrapper.optimizer, lasting=False)

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Brings ranges and quantizers to where the schedule has them.

        Args:
            runner (Runner): The runner of the training process.
            batch_idx (int): The index of the current batch.
            data_batch: Not used.
        """
        self._training.before_step(runner.iter / max(1, len(runner.train_dataloader)))

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Records the ranges and more after each pass over the frames, in loops that count by steps.

        Args:
            runner (Runner): The runner of the training process.
            batch_idx (int): The index of the current batch.
            data_batch: Not used.
            outputs: Not used.
        """
        self._record.after_step(runner)

    def after_train_epoch(self, runner) -> None:
        """Records the ranges and more, in the log, the visualizer and ``training.json``.

        Args:
            runner (Runner): The runner of the training process.
        """
        self._record.after_epoch(runner)

    def before_val_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Has ranges go with the weights that are validated, which may be averaged ones.

        Args:
            runner (Runner): The runner of the validation process.
            batch_idx (int): The index of the current batch.
            data_batch: Not used.
        """
        if batch_idx == 0 and self._training is not None:
            self._training.follow_weights()

    def after_val_epoch(self, runner, metrics: Optional[Dict[str, float]] = None) -> None:
        """Puts mAP and NDS beside the ranges, where validation belongs to a training.

        Args:
            runner (Runner): The runner of the validation process.
            metrics (dict): Of the validation, by name.
        """
        if self._record is not None:
            self._record.after_validation(runner, metrics)

    def before_val(self, runner) -> None:
        """Calibrates, where validation runs on its own.

        Args:
            runner (Runner): The runner of the validation process.
        """
        self._ensure_calibrated(runner)

    def before_test(self, runner) -> None:
        """Calibrates, unless the checkpoint was quantized.

        Args:
            runner (Runner): The runner of the testing process.
        """
        # Before the record of the run is written, which says where its detections go.
        for metric in runner.test_loop.evaluator.metrics:
            # MMDetection3D throws nuScenes detections away unless told where to keep them.
            if getattr(metric, 'jsonfile_prefix', '') is None:
                metric.jsonfile_prefix = os.path.join(runner.log_dir, 'predictions')
        self._ensure_calibrated(runner)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Adds the recipe to a training checkpoint, so that it is recognised as quantized.

        Args:
            runner (Runner): The runner of the training process.
            checkpoint (dict): What will be saved.
        """
        stamp = checkpoints.stamp(self.recipe, self._model(runner), self._teacher)
        checkpoint.setdefault('meta', {})[checkpoints.META_KEY] = stamp

    def _ensure_calibrated(self, runner) -> None:
        model = self._model(runner)
        logger = runner.logger
        if self.recipe.mode == 'float':
            logger.info('QuantHook: recipe.mode is float, every quantizer is off')
        elif lifecycle.is_calibrated(model):
            if getattr(self, '_reported', False):
                return
            logger.info('QuantHook: the checkpoint is quantized, its ranges are used')
        else:
            self._calibrate(runner, model)
        if not getattr(self, '_reported', False):
            self._report(runner, model)
        self._reported = True

    def _calibrate(self, runner, model) -> None:
        spec, logger = self.recipe.calibration, runner.logger
        loader, frames = calibration_loader(runner.cfg, spec, logger)
        logger.info(f'QuantHook: calibrating on {frames} frames of the {spec.split} split, seed {spec.seed}')
        start = time.time()
        seen = lifecycle.calibrate(
            model,
            with_progress(loader, logger, 'QuantHook'),
            runner.model.test_step,
            names=frame_name,
            logger=logger,
        )
        logger.info(f'QuantHook: calibrated on {seen} batches in {time.time() - start:.1f} s')
        if self.save and is_main_process():
            path = os.path.join(runner.log_dir, 'quantized.pth')
            meta = {'dataset_meta': plain(getattr(loader.dataset, 'metainfo', {}))}
            checkpoints.save_checkpoint(model, self.recipe, path, meta)
            write_text(os.path.join(runner.work_dir, 'last_quantized'), path)
            logger.info(f'QuantHook: quantized checkpoint saved as {path}')
            self._teacher = os.path.abspath(path)
        barrier()

    def _report(self, runner, model) -> None:
        rows = coverage(model)
        runner.logger.info('QuantHook: coverage\n' + coverage_table(rows))
        if is_main_process():
            write_run(runner.log_dir, model, self.recipe, _facts(runner))


def _facts(runner) -> Dict:
    """What the record of a run says beside the recipe."""
    dataset = (runner.cfg.get('test_dataloader') or {}).get('dataset') or {}
    root = dataset.get('data_root')
    # The loop is a part of the config until it is built, which a training need not do.
    evaluator = getattr(runner._test_loop, 'evaluator', None)
    folders = [getattr(m, 'jsonfile_prefix', None) for m in getattr(evaluator, 'metrics', ())]
    predictions = next(filter(None, folders), None)
    return {
        'framework': 'mmdet3d',
        'config': runner.cfg.filename,
        'checkpoint': runner._load_from and str(runner._load_from),
        'data_root': root and os.path.abspath(root),
        'dataset_version': (dataset.get('metainfo') or {}).get('version', 'v1.0-trainval'),
        'predictions': predictions and os.path.abspath(predictions),
    }
