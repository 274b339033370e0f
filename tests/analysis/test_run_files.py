"""The files of a run, wherever the run wrote them."""

import json
import os

import pytest

from q3d_plugin.analysis.run_files import find_run, metrics_of
from q3d_plugin.errors import Q3DError

SUMMARY = {'mean_ap': 0.5, 'nd_score': 0.6, 'mean_dist_aps': {'car': 0.7, 'bus': 0.3}}
START = 1_700_000_000.0


def write(path, content, age=0.0):
    """A JSON file that was written ``age`` seconds before the run began."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    os.utime(path, (START - age, START - age))
    return path


@pytest.fixture
def run(tmp_path):
    """A run whose detections go where ``jsonfile_prefix`` says: beside its folder, as in the demo."""
    elsewhere = tmp_path / 'w8a8' / 'predictions'
    write(tmp_path / 'w8a8' / 'a' / 'run.json', {'predictions': str(elsewhere), 'time': START})
    return tmp_path / 'w8a8' / 'a', elsewhere / 'pred_instances_3d'


def test_detections_are_found_where_the_run_says_that_they_go(run):
    folder, elsewhere = run
    assert find_run(folder).results is None and 'has not been evaluated' in find_run(folder).no_results
    path = write(elsewhere / 'results_nusc.json', {}, age=-60)
    write(elsewhere / 'metrics_summary.json', SUMMARY, age=-60)
    found = find_run(folder)
    assert found.results == path and not found.no_results
    assert found.metrics['mAP'] == 0.5 and found.metrics['AP'] == SUMMARY['mean_dist_aps']
    # A run that is compared with has its metrics there too.
    compared = find_run(folder.parent, float_run=folder)
    assert compared.float_metrics['NDS'] == 0.6 and compared.float_results == path
    assert found.float_results is None


def test_what_an_earlier_run_left_there_is_not_taken(run):
    folder, elsewhere = run
    write(elsewhere / 'results_nusc.json', {}, age=60)
    write(elsewhere / 'metrics_summary.json', SUMMARY, age=60)
    write(folder.parent / 'b' / 'b.json', {'m/mAP': 0.9}, age=60)
    for place in (folder, folder.parent):
        found = find_run(place)
        assert found.results is None and 'older than this run' in found.no_results
        assert found.metrics is None


def test_detections_in_the_folder_are_found_without_a_record(tmp_path):
    path = write(tmp_path / 'eval' / 'results_nusc.json', {})
    assert find_run(tmp_path).results == path
    # Records of early runs, and of runs that were moved here, do not help.
    write(tmp_path / 'run.json', {'predictions': '/nowhere/predictions'})
    assert find_run(tmp_path).results == path


def test_metrics_of_mmdetection3d(tmp_path):
    content = {'m/NDS': 0.4, 'm/mAP': 0.3, 'm/car_AP_dist_0.5': 0.2, 'm/car_AP_dist_1.0': 0.6}
    write(tmp_path / '2026' / '2026.json', content)
    write(tmp_path / '2026' / 'other.json', {'m/mAP': 0.9})
    found = metrics_of(tmp_path)
    assert found['mAP'] == 0.3 and found['NDS'] == 0.4 and found['AP'] == {'car': pytest.approx(0.4)}


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(Q3DError, match='nowhere'):
        find_run(tmp_path / 'nowhere')
