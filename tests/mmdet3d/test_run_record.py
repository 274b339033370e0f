"""The record of a run in MMDetection3D says where its detections are, and the report finds them there."""

import json
from pathlib import Path

import pytest

from q3d_plugin.analysis.run_files import find_run

RECIPE = {'calibration': {'frames': 1}}


@pytest.mark.parametrize('prefix', ['beside', None])
def test_detections_of_a_run_are_found_from_its_folder(runner, float_checkpoint, tmp_path, prefix):
    # The demo names a folder beside that of the run; without one the hook chooses one inside it.
    options = {'test_evaluator.jsonfile_prefix': prefix and str(tmp_path / prefix)}
    made = runner(float_checkpoint, RECIPE, **options)
    made.test()
    folder = Path(made.log_dir)
    record = json.loads((folder / 'run.json').read_text())
    expected = tmp_path / prefix if prefix else folder / 'predictions'
    assert record['predictions'] == str(expected)
    found = find_run(folder)
    assert found.results == expected / 'pred_instances_3d' / 'results_nusc.json' and found.results.is_file()
    assert found.metrics['mAP'] is not None and set(found.metrics['AP']) > {'car', 'bus'}
