"""What a training shows of itself in OpenPCDet: log, TensorBoard and ``training.json``.

OpenPCDet has no hooks. Its trainer writes to TensorBoard whatever the detector's forward pass returns in
``tb_dict``. So an epoch is recorded in the forward pass of its last step, before the optimizer's last step.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Dict, Optional

import torch

from q3d_plugin.openpcdet.data import rank_and_world
from q3d_plugin.training import QuantTraining
from q3d_plugin.training.history import FILE, TrainingHistory, scalars_of, words_of

__all__ = ['RunRecord']


class RunRecord:
    """Records every epoch of a run.

    Args:
        training: What is recorded.
        folder: Of the run, which a training that is resumed has, too; None where none is known.
        logger: OpenPCDet's.
        step: Training steps that were done before.
    """

    def __init__(
        self, training: QuantTraining, folder: Optional[str], logger: logging.Logger, step: int = 0
    ) -> None:
        self._training, self._logger, self._start = training, logger, step
        self._sums: Dict[str, Any] = {}
        self._counts: Dict[str, int] = {}
        self._history: Optional[TrainingHistory] = None
        if folder is not None and rank_and_world()[0] == 0:
            path = Path(folder) / FILE
            self._history = TrainingHistory(path, path if path.is_file() else None, step, logger)

    def scalars(self, step: int, steps: int, shown: Mapping[str, Any]) -> Dict[str, float]:
        """Scalars for TensorBoard, at the end of an epoch; nothing in the steps before.

        Every process has to call it in each training step.

        Args:
            step: Training steps that are done, this one included.
            steps: Training steps of an epoch.
            shown: The ``tb_dict`` of the step, whose losses are averaged over the epoch.

        Returns:
            dict: By name, to be added to ``tb_dict``.
        """
        self._add(shown)
        if step % steps:
            return {}
        record = self._training.finish_epoch(step / steps)
        losses = {name: float(value) / self._counts[name] for name, value in self._sums.items()}
        self._sums, self._counts = {}, {}
        if rank_and_world()[0] != 0:
            return {}
        first = self._training.record.first
        if self._history is not None:
            self._history.add(record, step, losses, first, self._start)
            first = self._history.first
        for line in words_of(record, first):
            self._logger.info(f'QuantDetector: {line}')
        return scalars_of(record)

    def _add(self, shown: Mapping[str, Any]) -> None:
        for name, value in shown.items():
            if 'loss' in name and isinstance(value, (int, float, torch.Tensor)):
                # A tensor is not read before the end of the epoch, since that waits for a CUDA device.
                value = value.detach() if isinstance(value, torch.Tensor) else value
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1
