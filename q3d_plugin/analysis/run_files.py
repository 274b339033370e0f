"""The files of a run: record, coverage, metrics, predictions, and where each of them lies."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from q3d_plugin import files
from q3d_plugin.errors import Q3DError
from q3d_plugin.metrics import summarize

__all__ = ['Run', 'find_run', 'metrics_of', 'target_of']


_RESULTS = 'results_nusc.json'


class Run:
    """The files of a run that were found; each is None where it is not there (yet).

    Attributes:
        folder: Of the run.
        run: ``run.json``: recipe, framework, checkpoint, data set and where the predictions go.
        coverage: Rows of ``coverage.json``.
        histograms: Rows of ``histograms.json``.
        metrics: mAP, NDS and AP by class, as :func:`q3d_plugin.metrics.summarize` gives them.
        float_metrics: The same of the float model.
        results: Path of ``results_nusc.json``.
        float_results: The same of the run of the float model.
        no_results: Why there is no such path; empty where there is one.
        sensitivity: ``sensitivity.json``.
        sweep: ``sweep.json``.
        training: ``training.json``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run: Optional[Dict[str, Any]] = None
        self.coverage: Optional[List[Dict[str, Any]]] = None
        self.histograms: Optional[List[Dict[str, Any]]] = None
        self.metrics: Optional[Dict[str, Any]] = None
        self.float_metrics: Optional[Dict[str, Any]] = None
        self.results: Optional[Path] = None
        self.float_results: Optional[Path] = None
        self.no_results = ''
        self.sensitivity: Optional[Dict[str, Any]] = None
        self.sweep: Optional[Dict[str, Any]] = None
        self.training: Optional[Dict[str, Any]] = None


def target_of(recipe: Optional[Mapping[str, Any]]) -> str:
    """The target of a recipe in plain form; recipes of early runs have none.

    Examples:
        >>> target_of({'target': 'tensorrt'}), target_of({'mode': 'ptq'})
        ('tensorrt', 'not recorded')
    """
    return str((recipe or {}).get('target') or 'not recorded')


def _newest(folder: Path, name: str, since: float = 0.0) -> Optional[Path]:
    """The newest file of a name (or pattern) below a folder; files from before ``since`` do not count."""
    found = [folder] if folder.is_file() and folder.match(name) else list(folder.rglob(name))
    times = {path: path.stat().st_mtime for path in found}
    return max((p for p in found if times[p] >= since), key=times.__getitem__, default=None)


def metrics_of(folder: Path, since: float = 0.0) -> Optional[Dict[str, Any]]:
    """The metrics of the newest evaluation below a folder; None where there is none.

    Args:
        folder: Of a run: the summary of the nuScenes devkit, else the JSON of MMDetection3D's test script.
        since: Seconds since the epoch; what was evaluated before belongs to another run.

    Returns:
        dict: As :func:`q3d_plugin.metrics.summarize` gives it.
    """
    summary = _newest(folder, 'metrics_summary.json', since)
    if summary is not None:
        found = files.read_json(summary, 'metrics')
        return summarize({'mAP': found['mean_ap'], 'NDS': found['nd_score']}, found['mean_dist_aps'])
    times = {path: path.stat().st_mtime for path in folder.rglob('*.json') if path.stem == path.parent.name}
    for path in sorted(times, key=times.__getitem__, reverse=True):
        if times[path] < since:
            break
        try:
            found = json.loads(path.read_text())
        except ValueError:
            continue
        made = summarize(found) if isinstance(found, Mapping) else {'mAP': None}
        if made['mAP'] is not None:
            return made
    return None


def _read(folder: Path, name: str) -> Any:
    path = _newest(folder, name)
    return None if path is None else files.read_json(path, 'report')


def _places(folder: Path, record: Optional[Mapping[str, Any]]) -> Tuple[List[Path], float]:
    """The folders that may hold what a run wrote, and since when."""
    record = record or {}
    # A run can be told to put its detections outside its folder, where those of an earlier run may lie still.
    named = record.get('predictions')
    places = [folder] + ([Path(named)] if named and Path(named).is_dir() else [])
    return places, record.get('time', 0.0)


def _metrics(folder: Path, record: Optional[Mapping[str, Any]]) -> Optional[Dict[str, Any]]:
    places, since = _places(folder, record)
    return next(filter(None, (metrics_of(place, since) for place in places)), None)


def _results(folder: Path, record: Optional[Mapping[str, Any]]) -> Tuple[Optional[Path], str]:
    """The detections of a run, or why there are none."""
    places, since = _places(folder, record)
    # What the run says of itself comes first.
    found = next(filter(None, (_newest(p, _RESULTS, since) for p in reversed(places))), None)
    if found is not None:
        return found, ''
    old = next(filter(None, (_newest(p, _RESULTS) for p in places)), None)
    if old is not None:
        return None, f'The detections in {old.parent} are older than this run, so they are of another one.'
    return None, f'No {_RESULTS}: the run has not been evaluated, or not on nuScenes.'


def find_run(
    folder: Path,
    float_run: Optional[Path] = None,
    sensitivity: Optional[Path] = None,
    sweep: Optional[Path] = None,
) -> Run:
    """Everything there is of a run.

    Args:
        folder: Of the run; where it has several of a file, the newest one counts.
        float_run: Of the run of the float model.
        sensitivity: Folder of the results of ``q3d sensitivity``; ``folder`` where None.
        sweep: Folder of the results of ``q3d sweep``; ``folder`` where None.

    Raises:
        Q3DError: A folder is missing, or a file cannot be read.
    """
    for path in filter(None, (folder, float_run, sensitivity, sweep)):
        if not path.exists():
            raise Q3DError(f'report: {str(path)!r} is not there')
    out = Run(folder)
    out.run = _read(folder, 'run.json')
    out.coverage = _read(folder, 'coverage.json')
    out.histograms = _read(folder, 'histograms.json')
    out.sensitivity = _read(sensitivity or folder, 'sensitivity.json')
    out.sweep = _read(sweep or folder, 'sweep.json')
    out.training = _read(folder, 'training.json')
    out.results, out.no_results = _results(folder, out.run)
    out.metrics = _metrics(folder, out.run)
    if float_run is not None:
        record = _read(float_run, 'run.json')
        out.float_metrics = _metrics(float_run, record)
        out.float_results, _ = _results(float_run, record)
    elif out.sweep and (out.sweep.get('float') or {}).get('mAP') is not None:
        out.float_metrics = out.sweep['float']
    return out
