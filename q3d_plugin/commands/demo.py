"""Runs the main job on the toy nuScenes: a detector in float and in W8A8 for two engines, side by side.

    q3d demo [--seed N] [--data DIR] [--out DIR]
    q3d demo --detector bevfusion

Generates the data, tests CenterPoint-Voxel by MMDetection3D's own script and evaluation, and ends with a
table, summary.json and a picture of one frame. BEVFusion is tested without its cameras and without its LiDAR
too; its code is in no wheel, so MMDET3D_ROOT has to name a checkout of MMDetection3D.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from q3d_plugin import files
from q3d_plugin.coverage import counted, is_layer
from q3d_plugin.errors import Q3DError
from q3d_plugin.metrics import summarize
from q3d_plugin.shipped import configs_folder
from q3d_plugin.text import text_table

__all__ = ['main']

TARGETS = ('tensorrt', 'openvino')
"""The engines whose arithmetic is simulated, as the recipe names them."""
BLANKED = {'cameras_blanked': 'cameras', 'lidar_blanked': 'lidar'}
"""Tests of the float model without one of its sensors -> the sensor that is blanked."""
COLOURS = ('tab:green', 'tab:blue', 'tab:red', 'tab:purple')


class Detector(NamedTuple):
    """A detector that the demo can run.

    Attributes:
        config: Of the float model, without its ending.
        profile: Of the toy data that it was trained on.
        data: The default data root.
        blank: Place of ``BlankSensor`` in its test pipeline; None where it has one sensor.
    """

    config: str
    profile: str
    data: Path
    blank: Optional[int] = None

    @property
    def tests(self) -> Tuple[str, ...]:
        """The names of all tests, in order."""
        return ('float', *TARGETS, *(() if self.blank is None else BLANKED))


DETECTORS = {
    'centerpoint': Detector('toy_centerpoint_voxel', 'default', Path('data/toy_nuscenes')),
    'bevfusion': Detector('toy_bevfusion', 'look-alikes', Path('data/toy_nuscenes_look_alikes'), 5),
}
"""By the name that ``--detector`` takes."""


def run(arguments: Sequence[Any], log: Path) -> None:
    """Runs a command of ``q3d`` in a process of its own.

    Args:
        arguments: Those of ``q3d``.
        log: Where all of its output goes.

    Raises:
        Q3DError: It failed; the end of its output is on standard error then.
    """
    words = [str(a) for a in arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.time()
    print(f'== q3d {" ".join(words)}', flush=True)
    with log.open('w') as f:
        command = [sys.executable, '-m', 'q3d_plugin', *words]
        code = subprocess.run(command, stdout=f, stderr=subprocess.STDOUT).returncode
    if code:
        print('\n'.join(log.read_text(errors='replace').splitlines()[-25:]), file=sys.stderr)
        raise Q3DError(f'q3d {words[0]} failed with exit status {code}; all of its output is in {log}')
    print(f'   {time.time() - start:.0f} s, log in {log}', flush=True)


def arguments_of_test(
    name: str, checkpoint: Path, root: Path, out: Path, detector: Detector = DETECTORS['centerpoint']
) -> List[str]:
    """The arguments of ``q3d`` that test one of the models.

    Args:
        name: ``'float'``, the target of the quantized model, or one of :data:`BLANKED`.
        checkpoint: Of the float model.
        root: The data set.
        out: Folder of the results of all models.
        detector: Which one.
    """
    ending = '_w8a8' if name in TARGETS else ''
    config = configs_folder() / 'mmdet3d' / f'{detector.config}{ending}.py'
    options = {
        'test_dataloader.dataset.data_root': f'{root}/',
        'train_dataloader.dataset.data_root': f'{root}/',
        'test_evaluator.data_root': f'{root}/',
        'test_evaluator.ann_file': f'{root}/nuscenes_infos_val.pkl',
        'test_evaluator.jsonfile_prefix': out / name / 'predictions',
    }
    if name in BLANKED:
        options[f'test_dataloader.dataset.pipeline.{detector.blank}.sensor'] = BLANKED[name]
    if name in TARGETS:
        options['custom_hooks.0.recipe.target'] = name
    changes = [f'{key}={value}' for key, value in options.items()]
    words = ['test', config, checkpoint, '--work-dir', out / name, '--cfg-options', *changes]
    return [str(word) for word in words]


def last_run(work_dir: Path) -> Path:
    """The newest folder of a run under a work dir that has metrics.

    Raises:
        Q3DError: There is none.
    """
    found = [d for d in work_dir.iterdir() if d.is_dir() and (d / f'{d.name}.json').is_file()]
    if not found:
        raise Q3DError(f'{work_dir} has no run with metrics')
    return max(found, key=str)


def layers_of(run_dir: Path) -> Dict[str, Any]:
    """How many layers are quantized, from the coverage that QuantHook wrote."""
    rows = files.read_json(run_dir / 'coverage.json', 'coverage')
    totals = counted([(r['kind'], r.get('note', ''), r['quantized']) for r in rows])
    layers = [r for r in rows if is_layer(r['kind'], r.get('note', ''))]
    return {
        'layers': len(totals.layers),
        'quantized_layers': sum(totals.layers),
        'quantized_elementwise': sum(totals.operations),
        'float_layers': [r['name'] for r in layers if not r['quantized']],
    }


def result_of(name: str, run_dir: Path) -> Dict[str, Any]:
    """Metrics and, of a quantized model, its layers."""
    metrics = summarize(files.read_json(run_dir / f'{run_dir.name}.json', 'metrics'))
    result = {**{k: metrics[k] for k in ('mAP', 'NDS', 'AP')}, 'run': str(run_dir)}
    return {**result, **layers_of(run_dir)} if name in TARGETS else result


def table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as text: a line for each model, with its difference from float."""
    reference, rows = summary['float'], []
    for name in (n for n in ('float', *TARGETS, *BLANKED) if n in summary):
        row, line = summary[name], [_title(name)]
        for key in ('mAP', 'NDS'):
            difference = '' if row is reference else f'{row[key] - reference[key]:+.4f}'
            line += [f'{row[key]:.4f}', difference]
        rows.append([*line, f'{row["quantized_layers"]} of {row["layers"]}' if 'layers' in row else '0'])
    header = ['', 'mAP', 'to float', 'NDS', 'to float', 'quantized layers']
    return text_table(header, rows, right=[1, 2, 3, 4])


def _title(name: str) -> str:
    if name in BLANKED:
        return f'float, {BLANKED[name]} blanked'
    return f'W8A8, {name}' if name in TARGETS else name


def _corners(box: Mapping[str, Any]) -> np.ndarray:
    """Corners of a box of nuScenes (global frame) from above, front edge first: (5, 2), closed."""
    from pyquaternion import Quaternion

    width, length, _ = box['size']
    shape = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1], [1, 1]]) * [length / 2, width / 2]
    rotation = Quaternion(box['rotation']).rotation_matrix[:2, :2]
    return shape @ rotation.T + np.asarray(box['translation'][:2])


def draw_frame(
    root: Path, predictions: Mapping[str, Mapping[str, list]], path: Path, score: float = 0.3
) -> str:
    """Draws the key frame with most ground truth from above: the truth, and the boxes of every model.

    Args:
        root: The data set.
        predictions: Name of the model -> its boxes by sample token, as nuScenes results hold them.
        path: The PNG to write.
        score: Boxes below it are left out.

    Returns:
        str: Token of the frame.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from nuscenes import NuScenes
    from nuscenes.utils.data_classes import LidarPointCloud
    from pyquaternion import Quaternion

    nusc = NuScenes('v1.0-mini', str(root), verbose=False)
    frames = next(iter(predictions.values()))
    token = max(frames, key=lambda t: len(nusc.get('sample', t)['anns']))
    sample = nusc.get('sample', token)
    lidar = nusc.get('sample_data', sample['data']['LIDAR_TOP'])
    cloud = LidarPointCloud.from_file(str(root / lidar['filename']))
    for record in (
        nusc.get('calibrated_sensor', lidar['calibrated_sensor_token']),
        nusc.get('ego_pose', lidar['ego_pose_token']),
    ):
        cloud.rotate(Quaternion(record['rotation']).rotation_matrix)
        cloud.translate(np.asarray(record['translation']))
    centre = np.asarray(record['translation'][:2])

    truth = [a for a in (nusc.get('sample_annotation', t) for t in sample['anns']) if a['num_lidar_pts'] > 0]
    panels = {'ground truth': truth}
    for name, boxes in predictions.items():
        panels[f'{_title(name)}, score > {score}'] = [b for b in boxes[token] if b['detection_score'] > score]
    figure = Figure(figsize=(14, 14.4), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True, sharey=True).flat
    points = cloud.points[:2].T - centre
    for axis, (title, boxes), colour in zip(axes, panels.items(), COLOURS):
        axis.scatter(*points.T, s=0.4, c='0.5', linewidths=0)
        for box in boxes:
            corners = _corners(box) - centre
            axis.plot(*corners.T, c=colour, lw=1.1)
            # From the middle of the box to that of its front edge.
            axis.plot(*np.stack([corners[:2].mean(0), corners[:4].mean(0)]).T, c=colour, lw=1.1)
        axis.set(title=f'{title}: {len(boxes)} boxes', aspect='equal', xlim=(-52, 52), ylim=(-52, 52))
        axis.set(xlabel='x in m, from the ego vehicle', ylabel='y in m')
        axis.label_outer()
    with files.replacing(path) as temporary:
        figure.savefig(temporary, dpi=80)
    return token


def check_bevfusion() -> None:
    """Raises :class:`Q3DError` unless BEVFusion's configs can be found, before anything long begins."""
    try:
        from q3d_plugin.mmdet3d.projects import import_bevfusion
    except ImportError as error:
        raise Q3DError(f'this needs MMDetection3D, which does not import here: {error}') from error
    import_bevfusion()


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the demo; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        '--detector', choices=tuple(DETECTORS), default='centerpoint', help='default: %(default)s'
    )
    folders = ', '.join(f'{d.data} ({name})' for name, d in DETECTORS.items())
    parser.add_argument('--data', type=Path, help=f'default: {folders}')
    parser.add_argument('--seed', type=int, default=0, help='seed of the generator (default: %(default)s)')
    parser.add_argument('--checkpoint', type=Path, help="float checkpoint (default: the plugin's own)")
    parser.add_argument('--out', type=Path, default=Path('work_dirs/demo'), help='default: %(default)s')
    args = parser.parse_args(argv)
    start, out, detector = time.time(), args.out, DETECTORS[args.detector]
    files.check_writable(out)
    if detector.blank is not None:
        check_bevfusion()
    data = args.data or detector.data
    checkpoint = args.checkpoint or configs_folder() / 'mmdet3d' / f'{detector.config}.pth'
    made = ['toy-data', '--out', data, '--seed', args.seed, '--infos', 'mmdet3d']
    made += [] if detector.profile == 'default' else ['--profile', detector.profile]
    run(made, out / 'logs' / 'toy-data.log')
    summary: Dict[str, Any] = {}
    predictions = {}
    for name in detector.tests:
        run(arguments_of_test(name, checkpoint, data, out, detector), out / 'logs' / f'{name}.log')
        summary[name] = result_of(name, last_run(out / name))
        if name in BLANKED:
            continue
        results = out / name / 'predictions' / 'pred_instances_3d' / 'results_nusc.json'
        predictions[name] = json.loads(results.read_text())['results']
    picture = out / 'frame.png'
    summary['frame'] = draw_frame(data, predictions, picture)
    summary['seed'], summary['seconds'] = args.seed, round(time.time() - start, 1)
    files.write_json(out / 'summary.json', summary)
    print(f'\n{table(summary)}\n')
    print(f'summary: {out / "summary.json"}   picture: {picture}   {summary["seconds"]:.0f} s in all')
    return 0
