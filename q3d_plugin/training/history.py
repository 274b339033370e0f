"""The history of a training: the file ``training.json``, scalars for a visualizer, and lines for a log."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Dict, List, Optional

from q3d_plugin.errors import Q3DError
from q3d_plugin.files import read_json, write_json

__all__ = ['FILE', 'TrainingHistory', 'range_ratios', 'scalars_of', 'words_of']

FILE = 'training.json'
"""The name of the file in the folder of a run."""

_logger = logging.getLogger(__name__)


class TrainingHistory:
    """The records of a training in a file that is written whole after each of them.

    Args:
        path: The file. An earlier one in its place is replaced at the first record.
        earlier: The file of the training that is resumed, which may be the same; None where none is.
        step: Training steps that were done before. What ``earlier`` has of later ones was done in vain.
        logger: Where it is said that a file cannot be read or written: a training goes on without it.

    Attributes:
        content: ``epochs``, the records of
            :meth:`~q3d_plugin.training.record.TrainingRecord.finish_epoch`, each with ``step`` and ``losses``
            (means over the epoch), first that of the model that training started from; and ``validations``,
            each with ``epoch``, ``step``, ``mAP`` and ``NDS``.
    """

    def __init__(
        self,
        path: Path,
        earlier: Optional[Path] = None,
        step: int = 0,
        logger: Optional[logging.Logger] = None,
    ) -> None:
        self.path, self._logger = Path(path), logger or _logger
        self.content: Dict[str, List[Dict[str, Any]]] = {'epochs': [], 'validations': []}
        if step > 0 and earlier is not None:
            self._take_over(earlier, step)

    def _take_over(self, earlier: Path, step: int) -> None:
        try:
            found = read_json(earlier, 'the history of the training')
            kept = {k: [e for e in found[k] if e['step'] <= step] for k in self.content}
        except (Q3DError, KeyError, TypeError) as error:
            self._logger.warning(f'{error}: curves begin where the training is resumed')
            return
        self.content = kept

    @property
    def first(self) -> Optional[Dict[str, Any]]:
        """The first record; None before there is one."""
        return self.content['epochs'][0] if self.content['epochs'] else None

    def add(
        self,
        record: Mapping[str, Any],
        step: int,
        losses: Optional[Mapping[str, float]] = None,
        start: Optional[Mapping[str, Any]] = None,
        start_step: int = 0,
    ) -> Dict[str, Any]:
        """Adds the record of an epoch and writes the file.

        Args:
            record: As ``finish_epoch`` returns it.
            step: Training steps that are done.
            losses: Means over the epoch, by name.
            start: The record before the first step, which begins a history that has nothing yet.
            start_step: Training steps that were done then.

        Returns:
            dict: What was added.
        """
        if start is not None and self.first is None:
            self.content['epochs'].append({**start, 'step': start_step, 'losses': {}})
        entry = {**record, 'step': step, 'losses': dict(losses or {})}
        self.content['epochs'].append(entry)
        self._write()
        return entry

    def validated(self, epoch: float, step: int, metrics: Mapping[str, Optional[float]]) -> None:
        """Adds a validation and writes the file.

        Args:
            epoch: Epochs since the start of training, with fractions.
            step: Training steps that are done.
            metrics: ``mAP`` and ``NDS``, as :func:`q3d_plugin.metrics.summarize` gives them.
        """
        found = {name: metrics.get(name) for name in ('mAP', 'NDS')}
        whole = int(epoch) if epoch == int(epoch) else epoch
        self.content['validations'].append({'epoch': whole, 'step': step, **found})
        self._write()

    def _write(self) -> None:
        try:
            write_json(self.path, self.content)
        except OSError as error:
            self._logger.warning(
                f'{str(self.path)!r} cannot be written: {error.strerror}; the training goes on without it'
            )


def range_ratios(record: Mapping[str, Any], first: Mapping[str, Any]) -> Dict[str, float]:
    """Ranges relative to those at the start, by ``'<layer>.<tensor>'``.

    Args:
        record: Of an epoch.
        first: The first one. Ranges that are zero there have no ratio.
    """
    before = {(row['name'], row['tensor']): row['range'] for row in first['layers']}
    return {
        f'{row["name"]}.{row["tensor"]}': row['range'] / before[row['name'], row['tensor']]
        for row in record['layers']
        if row['range'] is not None and (before.get((row['name'], row['tensor'])) or 0) > 0
    }


def scalars_of(record: Mapping[str, Any]) -> Dict[str, float]:
    """What a visualizer shows of a record: totals under ``q3d/``, ranges under ``q3d_ranges/``.

    TensorBoard folds scalars by what stands before the first slash, so the few totals are not buried among
    two ranges of each layer.

    Args:
        record: As ``finish_epoch`` returns it; what was not counted is left out.
    """
    out = {f'q3d/{name}': value for name, value in record['totals'].items()}
    out.update({f'q3d_ranges/{row["name"]}.{row["tensor"]}': row['range'] for row in record['layers']})
    return {name: value for name, value in out.items() if value is not None}


def _percent(value: Optional[float]) -> str:
    return 'an unknown share' if value is None else f'{100 * value:.3g}%'


def _most(record: Mapping[str, Any], tensor: str, key: str) -> str:
    known = [row for row in record['layers'] if row['tensor'] == tensor and row[key]]
    if not known:
        return ''
    row = max(known, key=lambda row: row[key])
    return f' (most: {row["name"]} {_percent(row[key])})'


def words_of(record: Mapping[str, Any], first: Optional[Mapping[str, Any]] = None) -> List[str]:
    """Lines for a log.

    Args:
        record: As ``finish_epoch`` returns it.
        first: The first record, which ranges are compared with.
    """
    shares = {name: _percent(value) for name, value in record['totals'].items()}
    words = (
        f'epoch {record["epoch"]:g}: {shares["clipped_activations"]} of the inputs'
        f'{_most(record, "input", "clipped")} and {shares["clipped_weights"]} of the weights'
        f'{_most(record, "weight", "clipped")} are clipped; {shares["changed_codes"]} of the weights'
        f'{_most(record, "weight", "changed")} have another integer than at the record before'
    )
    ratios = range_ratios(record, first) if first is not None else {}
    if not ratios:
        return [words]
    name = max(ratios, key=lambda n: abs(math.log(ratios[n])) if ratios[n] > 0 else math.inf)
    least, largest = min(ratios.values()), max(ratios.values())
    return [
        words,
        f'epoch {record["epoch"]:g}: ranges are {least:.3g} to {largest:.3g} times those at the start; '
        f'the one of {name} moved most',
    ]
