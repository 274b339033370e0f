"""What a training shows of itself in MMEngine: log, visualizer and ``training.json``."""

from pathlib import Path
from typing import Dict, Mapping, Optional

from mmengine.dist import is_main_process
from mmengine.runner import EpochBasedTrainLoop

from q3d_plugin.metrics import summarize
from q3d_plugin.training import QuantTraining
from q3d_plugin.training.history import FILE, TrainingHistory, scalars_of, words_of

__all__ = ['RunRecord']


class RunRecord:
    """Records every epoch of a run: each pass over the training frames, whatever the loop counts by.

    Args:
        runner (Runner): Of the training process, its checkpoint loaded.
        training: What is recorded.
    """

    def __init__(self, runner, training: QuantTraining) -> None:
        self._training = training
        self._start = self._done = runner.iter
        earlier = _earlier(runner) if runner._resume else None
        path = Path(runner.log_dir) / FILE
        self._history = TrainingHistory(path, earlier, runner.iter, runner.logger)

    def after_step(self, runner) -> None:
        """Records an epoch that ended with this step, where the loop counts by steps.

        Args:
            runner (Runner): The runner.
        """
        done = runner.iter + 1
        if not isinstance(runner.train_loop, EpochBasedTrainLoop) and done % _length(runner) == 0:
            self._finish(runner, done)

    def after_epoch(self, runner) -> None:
        """Records the epoch of the loop that ended, or what is left of the last one.

        Args:
            runner (Runner): The runner.
        """
        if runner.iter > self._done:
            self._finish(runner, runner.iter)

    def after_validation(self, runner, metrics: Optional[Mapping[str, float]]) -> None:
        """Takes down the metrics of a validation during training.

        Args:
            runner (Runner): The runner.
            metrics (dict): By name, as MMEngine has them.
        """
        if is_main_process() and metrics:
            found = summarize(metrics)
            self._history.validated(runner.iter / _length(runner), runner.iter, found)

    def _finish(self, runner, done: int) -> None:
        record = self._training.finish_epoch(done / _length(runner))
        losses = _losses(runner, done - self._done)
        self._done = done
        if not is_main_process():
            return
        start = self._training.record.first
        self._history.add(record, done, losses, start, self._start)
        for line in words_of(record, self._history.first):
            runner.logger.info(f'QuantHook: {line}')
        runner.visualizer.add_scalars(scalars_of(record), step=done)


def _length(runner) -> int:
    """Steps of an epoch."""
    return max(1, len(runner.train_dataloader))


def _losses(runner, steps: int) -> Dict[str, float]:
    """Means of the losses over the last steps, as MMEngine logged them."""
    scalars = runner.message_hub.log_scalars
    names = [name for name in scalars if name.startswith('train/') and 'loss' in name]
    return {name[len('train/') :]: float(scalars[name].mean(steps)) for name in names}


def _earlier(runner) -> Optional[Path]:
    """The history of the run that is resumed: the newest in its work dir, where its checkpoint lies."""
    checkpoint = runner._load_from
    folder = Path(runner.work_dir) if checkpoint is None else Path(str(checkpoint)).parent
    found = {path: path.stat().st_mtime for path in folder.glob(f'*/{FILE}')}
    return max(found, key=found.__getitem__, default=None)
