"""The picture of a frame: boxes where the nuScenes devkit has them, from above and in the camera's image."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip('matplotlib')
pytest.importorskip('nuscenes.nuscenes')

from nuscenes.utils.geometry_utils import view_points

from q3d_plugin.analysis import picture, report
from q3d_plugin.analysis.nuscenes import Detections
from q3d_plugin.analysis.picture import _labels
from q3d_plugin.analysis.run_files import find_run

VERSION = 'v1.0-mini'


def _sorted(points):
    """Corners in one order, whichever comes first."""
    middle = points.mean(0)
    return points[np.argsort(np.arctan2(*(points - middle).T))]


def test_boxes_are_drawn_where_the_devkit_has_them_in_the_frame_of_the_lidar(
    root, nusc, written, monkeypatch
):
    detections = Detections(written(), str(root), VERSION)
    outlines, outline = [], picture.outline
    monkeypatch.setattr(picture, 'outline', lambda *a: outlines.append(outline(*a)) or outlines[-1])
    made, words = picture.frame_picture(detections, score=0.5)
    assert made.startswith(b'\x89PNG')
    token = words.split()[1].rstrip(';')
    truth = detections.truth[token]
    assert len(truth) == max(len(detections.truth[t]) for t in detections.truth.sample_tokens)
    assert len(outlines) == len(truth) + sum(b.detection_score >= 0.5 for b in detections.predicted[token])
    _, boxes, _ = nusc.get_sample_data(nusc.get('sample', token)['data']['LIDAR_TOP'])
    theirs = [box.bottom_corners()[:2].T for box in boxes]
    for drawn in outlines:
        closest = min(np.abs(_sorted(drawn[:4]) - _sorted(box)).max() for box in theirs)
        # The devkit's corners lie on the tilted floor of the box, the outline at half of its height.
        assert closest < 0.15


def test_boxes_are_projected_as_the_devkit_projects_annotations(root, nusc, written):
    truth = Detections(written(), str(root), VERSION).truth
    token = max(truth.sample_tokens, key=lambda t: len(truth[t]))
    sample, compared = nusc.get('sample', token), 0
    views = picture.camera_views(nusc, token)
    assert sorted(v.channel for v in views) == sorted(k for k in sample['data'] if k.startswith('CAM'))
    for view in views:
        path, boxes, intrinsic = nusc.get_sample_data(sample['data'][view.channel])
        assert path == str(view.image) and view.size == (1600, 900)
        mine = [view.corners(box) for box in truth[token]]
        mine = [corners for corners in mine if corners is not None]
        theirs = [view_points(box.corners(), intrinsic, normalize=True)[:2].T for box in boxes]
        assert len(mine) <= len(theirs)  # the evaluation leaves out what no point lies in
        for corners in mine:
            assert min(np.abs(corners - other).max() for other in theirs) < 0.5
            compared += 1
    assert compared > 5


def test_the_camera_that_sees_most_is_shown_and_all_sets_have_the_same_colours(root, written, monkeypatch):
    found, reference = (Detections(written(noise=n), str(root), VERSION) for n in (0.3, 0.0))
    shown = {}
    draw_image, draw_above = picture._draw_image, picture._draw_above
    monkeypatch.setattr(
        picture,
        '_draw_image',
        lambda a, view, sets: shown.update(image=(view, sets)) or draw_image(a, view, sets),
    )
    monkeypatch.setattr(
        picture,
        '_draw_above',
        lambda a, n, t, sets, v: shown.update(above=sets) or draw_above(a, n, t, sets, v),
    )
    _, words = picture.frame_picture(found, reference)
    view, sets = shown['image']
    assert shown['above'] is sets and [s.name.split(',')[0] for s in sets] == [
        'ground truth', 'float', 'quantized'
    ]  # fmt: skip
    assert len({s.colour for s in sets}) == 3 and f'{view.channel} sees most' in words
    token = words.split()[1].rstrip(';')
    counts = {
        v.channel: sum(v.corners(b) is not None for b in found.truth[token])
        for v in picture.camera_views(found.nusc, token)
    }
    assert counts[view.channel] == max(counts.values()) > 0


def test_without_images_there_is_the_view_from_above_and_a_line(root, written, tmp_path):
    bare = tmp_path / 'bare'
    shutil.copytree(root, bare, ignore=lambda folder, names: [n for n in names if n.endswith('.jpg')])
    made, words = picture.frame_picture(Detections(written(), str(bare), VERSION))
    assert made.startswith(b'\x89PNG') and 'no camera image of it is on disk' in words


def test_labels_do_not_cover_each_other_and_stay_in_the_image():
    rng = np.random.default_rng(0)
    seen = []
    for i in range(60):
        low = rng.uniform(-200, [1600, 900])
        seen.append((low + rng.uniform(0, 1, (8, 2)) * rng.uniform(20, 300, 2), f'car 0.{i:02d}'))
    places = _labels(seen, (1600, 900))
    assert 10 < len(places) < 60
    boxes = [(x, y - 1600 / 48, x + 12.5 * (len(t) + 1), y) for x, y, t in places]
    for i, a in enumerate(boxes):
        assert a[0] >= 0 and a[1] >= 0 and a[2] <= 1600 and a[3] <= 900
        for b in boxes[:i]:
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def test_the_page_of_a_run_shows_the_boxes_of_the_float_run(root, written, tmp_path):
    folders = {}
    for name, noise in (('quantized', 0.3), ('float', 0.0)):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        shutil.copy(written(noise=noise), folders[name] / 'results_nusc.json')
        record = {'data_root': str(root), 'dataset_version': VERSION}
        (folders[name] / 'run.json').write_text(json.dumps(record))
    alone = report.build(find_run(folders['quantized']))
    assert 'drawn where --float names its run' in alone
    page = report.build(find_run(folders['quantized'], folders['float']))
    assert 'sees most objects' in page and 'alt="camera image and view from above"' in page
    assert 'of the float model' not in page
    (folders['float'] / 'results_nusc.json').write_text('{}')
    damaged = report.build(find_run(folders['quantized'], folders['float']))
    assert 'No boxes of the float model: ' in damaged and 'sees most objects' in damaged
