"""The main job on the toy nuScenes: float and W8A8 CenterPoint-Voxel, by MMDetection3D's evaluation.

Called by demo.sh, which sets everything up. Ends with a table, ``summary.json`` and a picture of one frame.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt

TOOLS = Path(__file__).resolve().parent
CONFIGS = {
    'float': TOOLS.parent / 'configs/mmdet3d/toy_centerpoint_voxel.py',
    'w8a8': TOOLS.parent / 'configs/mmdet3d/toy_centerpoint_voxel_w8a8.py',
}
CHECKPOINT = TOOLS.parent / 'configs/mmdet3d/toy_centerpoint_voxel.pth'


def run(command, log: Path) -> None:
    """Runs a command with its output in ``log``; the end of the log is shown where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.time()
    print(f'== {" ".join(str(c) for c in command[1:])}', flush=True)
    with log.open('w') as f:
        code = subprocess.run([str(c) for c in command], stdout=f, stderr=subprocess.STDOUT).returncode
    if code:
        tail = log.read_text(errors='replace').splitlines()[-25:]
        print('\n'.join(tail), file=sys.stderr)
        raise SystemExit(f'demo: that failed with exit status {code}; all of its output is in {log}')
    print(f'   {time.time() - start:.0f} s, log in {log}', flush=True)


def prepare(root: Path, seed: int) -> None:
    """Generates the data set and its info files, unless they are there."""
    logs = Path('work_dirs/demo/logs')
    run([sys.executable, TOOLS / 'toy_nuscenes', '--out', root, '--seed', seed], logs / 'generate.log')
    infos = [root / f'nuscenes_infos_{split}.pkl' for split in ('train', 'val')]
    if not all(p.is_file() for p in infos):
        run([sys.executable, TOOLS / 'make_infos.py', root], logs / 'infos.log')


def evaluate(name: str, checkpoint: Path, root: Path, out: Path) -> Path:
    """Tests one config with MMDetection3D's own script.

    Returns:
        Path: The folder of this run, with metrics, predictions and (quantized) coverage.
    """
    work_dir = out / name
    command = [sys.executable, TOOLS / 'test.py', CONFIGS[name], checkpoint, '--work-dir', work_dir]
    data = f'{root}/'
    options = {
        'test_dataloader.dataset.data_root': data,
        'train_dataloader.dataset.data_root': data,
        'test_evaluator.data_root': data,
        'test_evaluator.ann_file': f'{data}nuscenes_infos_val.pkl',
        'test_evaluator.jsonfile_prefix': work_dir / 'predictions',
    }
    run([*command, '--cfg-options', *(f'{k}={v}' for k, v in options.items())], out / 'logs' / f'{name}.log')
    return max((d for d in work_dir.iterdir() if d.is_dir() and (d / f'{d.name}.json').is_file()), key=str)


def metrics_of(run_dir: Path) -> dict:
    """mAP, NDS and the AP of each class, from the JSON that MMDetection3D wrote."""
    found = json.loads((run_dir / f'{run_dir.name}.json').read_text())
    short = {k.rsplit('/', 1)[-1]: v for k, v in found.items()}
    classes = sorted({k.split('_AP_dist_')[0] for k in short if '_AP_dist_' in k})
    per_class = {
        c: float(np.mean([v for k, v in short.items() if k.startswith(f'{c}_AP_dist_')])) for c in classes
    }
    return {'mAP': short['mAP'], 'NDS': short['NDS'], 'AP': per_class}


def layers_of(run_dir: Path) -> dict:
    """How many layers are quantized, from the coverage that QuantHook wrote."""
    rows = json.loads((run_dir / 'coverage.json').read_text())
    layers = [r for r in rows if r['kind'] not in ('Add', 'Concat')]
    others = [r for r in rows if r['kind'] in ('Add', 'Concat')]
    return {
        'layers': len(layers),
        'quantized_layers': sum(r['quantized'] for r in layers),
        'quantized_elementwise': sum(r['quantized'] for r in others),
        'float_layers': [r['name'] for r in layers if not r['quantized']],
    }


def table(summary: dict) -> str:
    """The result as text."""
    rows = [('', 'mAP', 'NDS', 'quantized layers')]
    for name in ('float', 'w8a8'):
        row = summary[name]
        count = f'{row["quantized_layers"]} of {row["layers"]}' if 'layers' in row else '0'
        rows.append((name, f'{row["mAP"]:.4f}', f'{row["NDS"]:.4f}', count))
    drop = {k: summary['w8a8'][k] - summary['float'][k] for k in ('mAP', 'NDS')}
    rows.append(('difference', f'{drop["mAP"]:+.4f}', f'{drop["NDS"]:+.4f}', ''))
    widths = [max(len(r[i]) for r in rows) for i in range(4)]
    lines = ['  '.join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows]
    lines.insert(1, '  '.join('-' * w for w in widths))
    return '\n'.join(lines)


def _corners(box: dict) -> np.ndarray:
    """Corners of a box of nuScenes (global frame) from above, front edge first: (5, 2), closed."""
    from pyquaternion import Quaternion

    width, length, _ = box['size']
    shape = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1], [1, 1]]) * [length / 2, width / 2]
    rotation = Quaternion(box['rotation']).rotation_matrix[:2, :2]
    return shape @ rotation.T + np.asarray(box['translation'][:2])


def draw_frame(root: Path, predictions: dict, path: Path, score: float = 0.3) -> str:
    """Draws the key frame with most ground truth from above, with the boxes of every model.

    Args:
        root: The data set.
        predictions: Name of the model -> its boxes by sample token, as nuScenes results hold them.
        path: The PNG to write.
        score: Boxes below it are left out.

    Returns:
        str: Token of the frame.
    """
    from nuscenes import NuScenes
    from nuscenes.utils.data_classes import LidarPointCloud
    from pyquaternion import Quaternion

    nusc = NuScenes('v1.0-mini', str(root), verbose=False)
    token = max(predictions['float'], key=lambda t: len(nusc.get('sample', t)['anns']))
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

    figure, axes = plt.subplots(1, 3, figsize=(21, 7.6), sharex=True, sharey=True)
    truth = [a for a in (nusc.get('sample_annotation', t) for t in sample['anns']) if a['num_lidar_pts'] > 0]
    panels = [('ground truth', truth, 'tab:green')] + [
        (f'{name}, score > {score}', [b for b in boxes[token] if b['detection_score'] > score], colour)
        for (name, boxes), colour in zip(predictions.items(), ('tab:blue', 'tab:red'))
    ]
    for axis, (title, boxes, colour) in zip(axes, panels):
        points = cloud.points[:2].T - centre
        axis.scatter(*points.T, s=0.3, c='0.6', linewidths=0)
        for box in boxes:
            corners = _corners(box) - centre
            axis.plot(*corners.T, c=colour, lw=1.1)
            axis.plot(*np.stack([corners[:2].mean(0), corners[:4].mean(0)]).T, c=colour, lw=1.1)
        axis.set(title=f'{title}: {len(boxes)} boxes', aspect='equal', xlim=(-52, 52), ylim=(-52, 52))
        axis.set_xlabel('x in m, from the ego vehicle')
    figure.tight_layout()
    temporary = path.with_name(f'.{path.name}.tmp.png')
    figure.savefig(temporary, dpi=80)
    os.replace(temporary, path)
    return token


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', type=Path, default=Path('data/toy_nuscenes'), help='default: %(default)s')
    parser.add_argument('--seed', type=int, default=0, help='seed of the generator (default: %(default)s)')
    parser.add_argument('--checkpoint', type=Path, default=CHECKPOINT, help='float checkpoint')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/demo'), help='default: %(default)s')
    args = parser.parse_args(argv)
    start = time.time()
    prepare(args.data, args.seed)
    summary, predictions = {}, {}
    for name in ('float', 'w8a8'):
        run_dir = evaluate(name, args.checkpoint, args.data, args.out)
        summary[name] = {**metrics_of(run_dir), 'run': str(run_dir)}
        if name != 'float':
            summary[name].update(layers_of(run_dir))
        results = args.out / name / 'predictions' / 'pred_instances_3d' / 'results_nusc.json'
        predictions[name] = json.loads(results.read_text())['results']
    picture = args.out / 'frame.png'
    summary['frame'] = draw_frame(args.data, predictions, picture)
    summary['seed'], summary['seconds'] = args.seed, round(time.time() - start, 1)
    temporary = args.out / '.summary.json.tmp'
    temporary.write_text(json.dumps(summary, indent=1) + '\n')
    os.replace(temporary, args.out / 'summary.json')
    print(f'\n{table(summary)}\n')
    print(f'summary: {args.out / "summary.json"}   picture: {picture}   {summary["seconds"]:.0f} s in all')
    return 0


if __name__ == '__main__':
    sys.exit(main())
