"""The commands of the analysis on a toy detector that needs no framework."""

import csv
import json

import pytest
import torch

pytest.importorskip('matplotlib')

from analysis_toys import ToyBench, toy_recipe

from q3d_plugin import lifecycle
from q3d_plugin.analysis import opening
from q3d_plugin.analysis.measures import OutputError
from q3d_plugin.analysis.run_files import target_of
from q3d_plugin.analysis.switch import Switch
from q3d_plugin.commands import report, sensitivity, sweep
from q3d_plugin.recipe import Recipe
from q3d_plugin.run_record import write_run

COMMANDS = {'sensitivity': sensitivity.main, 'sweep': sweep.main}


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / 'toy.pth'
    torch.save({'w': torch.ones(3)}, path)
    return path


@pytest.fixture
def run(monkeypatch, tmp_path, checkpoint):
    """Runs a command on a toy: ``run('sweep', *arguments, bench=...)``; gives the exit status."""

    def call(name, *arguments, bench=None, out='out'):
        made = bench or ToyBench(checkpoint=checkpoint)
        monkeypatch.setattr(opening, 'open_bench', lambda *_: made)
        given = ['toy.py', str(checkpoint), '--out', str(tmp_path / out), *map(str, arguments)]
        return COMMANDS[name](given)

    return call


@pytest.fixture
def spoilt(monkeypatch):
    """Makes the range of a weight NaN after the calibration: ``spoilt('head.heat.2')``."""
    calibrate = sensitivity.calibrate

    def spoil(name):
        def calibrated(bench, recipe):
            made = calibrate(bench, recipe)
            dict(lifecycle.units(bench.model))[name].weight_quantizer._amax.fill_(float('nan'))
            return made

        monkeypatch.setattr(sensitivity, 'calibrate', calibrated)

    return spoil


def test_sensitivity_writes_table_list_and_pictures(run, tmp_path, capsys):
    code = run('sensitivity', '--frames', 2, '--reverse', '--bits', 4, 4, '--keep-output-error', 0.05)
    assert code == 0
    out = tmp_path / 'out'
    found = json.loads((out / 'sensitivity.json').read_text())
    rows = found['rows']
    names = [n for n, _ in lifecycle.units(ToyBench().model)]
    assert sorted(r['name'] for r in rows) == sorted(names)
    effects = [r['output_relative_l1'] for r in rows]
    assert effects == sorted(effects, reverse=True) and effects[-1] > 0
    assert all(r['reverse_relative_l1'] is not None for r in rows)
    skipped = json.loads((out / 'skip.json').read_text())
    assert skipped == found['skip']['names'] and set(skipped) <= set(names)
    # What is pasted is what was measured.
    pasted = eval(f'dict({(out / "skip.txt").read_text()})')
    bench = ToyBench(recipe=Recipe.from_dict({**found['recipe'], **pasted}))
    assert [n for n, u in lifecycle.units(bench.model) if not u.quantizers()] == sorted(
        skipped, key=names.index
    )
    with (out / 'sensitivity.csv').open() as f:
        assert [r['name'] for r in csv.DictReader(f)] == [r['name'] for r in rows]
    for picture in ('sensitivity.png', 'skip.png'):
        assert (out / picture).read_bytes().startswith(b'\x89PNG')
    assert not list(out.glob('*.tmp'))
    assert rows[0]['name'] in capsys.readouterr().out


def test_sensitivity_with_nan_in_one_layer_goes_on(run, spoilt, tmp_path):
    spoilt('head.heat.2')
    assert run('sensitivity', '--frames', 1) == 0
    rows = json.loads((tmp_path / 'out' / 'sensitivity.json').read_text())['rows']
    assert rows[0]['name'] == 'head.heat.2' and rows[0]['nan'] == 3 * 16 * 16
    assert all(r['nan'] == 0 and r['output_relative_l1'] > 0 for r in rows[1:])
    # A layer that breaks the outputs is the first to stay float.
    assert json.loads((tmp_path / 'out' / 'skip.json').read_text())[0] == 'head.heat.2'


def test_sensitivity_goes_on_where_every_output_is_nan(run, spoilt, tmp_path, capsys):
    spoilt('stem.0')
    assert run('sensitivity', '--frames', 2) == 0
    found = json.loads((tmp_path / 'out' / 'sensitivity.json').read_text())
    assert found['rows'][0]['name'] == 'stem.0' and found['rows'][0]['nan'] > 0
    assert found['skip']['names'][0] == 'stem.0' and found['skip']['errors'][0] is None
    assert 'everything quantized: none, all NaN or Inf' in capsys.readouterr().out
    assert (tmp_path / 'out' / 'skip.png').read_bytes().startswith(b'\x89PNG')


def test_sensitivity_says_what_became_of_layers_that_nan_came_to(run, tmp_path, checkpoint, capsys):
    bench = ToyBench(checkpoint=checkpoint)
    frames = bench.frames

    def spoilt(split, count, seed=0):
        made = list(frames(split, count, seed))
        made[0] = made[0].clone()
        made[0][0, 0, 3, 3] = float('nan')
        return made

    bench.frames = spoilt
    # In one frame of three to every layer, and in all frames to those behind one.
    bench._float_state['head.heat.0.bias'][0] = float('nan')
    assert run('sensitivity', '--frames', 2, bench=bench) == 0
    found = json.loads((tmp_path / 'out' / 'sensitivity.json').read_text())
    quantized = Switch(bench.model).names
    assert 'head.heat.2' not in quantized and len(quantized) == len(found['rows']) - 1
    for row in found['rows']:
        measured = row['name'] in quantized
        assert row['note'].endswith('its range is of the others' if measured else 'left float')
        assert (row['l1'] is not None) == measured
    # The list holds what was float while it was made.
    assert found['left_float'] == ['head.heat.2']
    assert json.loads((tmp_path / 'out' / 'skip.json').read_text())[0] == 'head.heat.2'
    assert 'A run stops there' in capsys.readouterr().out


def test_sensitivity_names_the_target(run, tmp_path, capsys):
    assert run('sensitivity', '--frames', 1, '--local') == 0
    target = target_of(toy_recipe().to_dict())
    assert capsys.readouterr().out.count(f'target {target}, frames measured on: 1 of the train split') == 1
    assert (tmp_path / 'out' / 'table.txt').read_text().startswith(f'target {target}')


def test_sensitivity_local_is_one_pass(run, tmp_path, checkpoint):
    bench, passes = ToyBench(checkpoint=checkpoint), []
    bench.model.register_forward_pre_hook(lambda *_: passes.append(1))
    assert run('sensitivity', '--frames', 2, '--local', bench=bench) == 0
    # Three frames of calibration, two of measurement.
    assert len(passes) == 3 + 2
    rows = json.loads((tmp_path / 'out' / 'sensitivity.json').read_text())['rows']
    assert all(r['output_relative_l1'] is None and r['l1'] > 0 for r in rows)


def test_sensitivity_calibrates_on_few_frames_where_the_recipe_has_many(run, tmp_path, checkpoint, capsys):
    recipe = toy_recipe(calibration={'frames': 300})
    for given, expected in (((), 32), (('--frames', 34), 34), (('--calibration-frames', 5), 5)):
        bench, counts = ToyBench(checkpoint=checkpoint, recipe=recipe), []
        frames = bench.frames
        bench.frames = lambda split, count, seed=0, f=frames, c=counts: (
            c.append(count) or f(split, count, seed)
        )
        assert run('sensitivity', '--local', *given, bench=bench) == 0
        found = json.loads((tmp_path / 'out' / 'sensitivity.json').read_text())
        assert found['recipe']['calibration']['frames'] == expected and expected in counts
        assert f'ranges of {expected} frames' in capsys.readouterr().out


def test_a_list_that_keeps_map(run, tmp_path, checkpoint, capsys):
    recipe = toy_recipe(weight={'bits': 3})
    # The toy's metric is made worse by every quantized layer, by those of the head most.
    bench = ToyBench(checkpoint=checkpoint, recipe=recipe)

    def evaluate(folder=None):
        on = [n for n, u in lifecycle.units(bench.model) if any(not q._disabled for q in u.quantizers())]
        return {'mAP': 0.6 - sum(0.01 if 'head' in n else 0.001 for n in on), 'NDS': None}

    bench.evaluate = evaluate
    names = [n for n, _ in lifecycle.units(bench.model)]
    heads = sum('head' in n for n in names)
    assert run('sensitivity', '--frames', 2, '--keep-map', 2.0, bench=bench) == 0
    found = json.loads((tmp_path / 'out' / 'sensitivity.json').read_text())
    ranked, skip = [r['name'] for r in found['rows']], found['skip']

    def loss(length):
        return sum(1.0 if 'head' in n else 0.1 for n in ranked[length:])

    shortest = next(n for n in range(len(ranked) + 1) if loss(n) <= 2.0)
    assert 0 < shortest < len(ranked) and heads > 2
    assert skip['names'] == ranked[:shortest] and skip['kept']
    assert skip['errors'] == pytest.approx([loss(n) for n in skip['lengths']])
    assert 'points of mAP below float' in capsys.readouterr().out
    # Where the longest list is too short, it is said.
    given = ('--frames', 2, '--keep-map', 2.0, '--max-skipped', 1)
    assert run('sensitivity', *given, bench=bench) == 0
    assert 'NOT kept' in capsys.readouterr().out
    # Where nothing need be float, one evaluation beside that of float tells.
    assert run('sensitivity', '--frames', 2, '--keep-map', 99, bench=bench) == 0
    skip = json.loads((tmp_path / 'out' / 'sensitivity.json').read_text())['skip']
    assert skip['names'] == [] and skip['lengths'] == [0] and skip['kept']

    bench.evaluate = lambda: {'mAP': None}
    assert run('sensitivity', '--frames', 2, '--keep-map', 2.0, bench=bench) == 2
    assert 'has no mAP' in capsys.readouterr().err


def test_listed_layers_are_quantized_without_smoothquant_where_that_is_asked_for(run, tmp_path, checkpoint):
    recipe = toy_recipe(weight={'bits': 4}, smoothquant={'alpha': 1.0})
    bench = ToyBench(checkpoint=checkpoint, recipe=recipe)
    given = ('--frames', 2, '--treat', 'standard', '--keep-output-error', 0, '--max-skipped', 3)
    assert run('sensitivity', *given, bench=bench) == 0
    found = json.loads((tmp_path / 'out' / 'sensitivity.json').read_text())
    skip = found['skip']
    assert skip['treat'] == 'standard' and skip['lengths'] == [0, 1, 2, 3] and not skip['kept']
    weighted = [n for n, u in lifecycle.units(ToyBench().model) if hasattr(u, 'weight')]
    ranked = [r['name'] for r in found['rows'] if r['name'] in weighted]
    best = min(zip(skip['errors'], skip['lengths']))
    assert skip['names'] == ranked[: best[1]]
    assert not (tmp_path / 'out' / 'skip.json').exists()
    # The error of each length is that of a detector which is made with such a recipe.
    for length, error in zip(skip['lengths'], skip['errors']):
        spare = {'overrides': [{'layers': ranked[:length], 'alpha': None}]} if length else {}
        plain = {**recipe.to_dict(), 'smoothquant': {'alpha': 1.0, **spare}}
        other = ToyBench(checkpoint=checkpoint, recipe=Recipe.from_dict(plain))
        other.prepare(other.recipe)
        measured = OutputError()
        for batch in other.frames('train', 2):
            quantized = other.forward(batch)
            lifecycle.set_enabled(other.model, False)
            measured.add({k: v.clone() for k, v in other.forward(batch).items()}, quantized)
            lifecycle.set_enabled(other.model, True)
        assert measured.relative_l1 == pytest.approx(error, rel=1e-3)
    pasted = eval(f'dict({(tmp_path / "out" / "skip.txt").read_text()})')
    assert pasted['smoothquant']['overrides'] == [{'layers': skip['names'], 'alpha': None}]


def test_sensitivity_of_groups(run, tmp_path):
    assert run('sensitivity', '--frames', 1, '--group', 1) == 0
    rows = json.loads((tmp_path / 'out' / 'sensitivity.json').read_text())['rows']
    assert {r['name'] for r in rows} == {'stem', 'block', 'down', 'up', 'concat', 'head'}


@pytest.mark.parametrize(
    'arguments, words',
    [
        (('--frames', 0), '--frames: 0'),
        (('--bits', 99, 8), 'weight.bits: 99'),
        (('--treat', 'standard'), 'no smoothquant'),
        (('--group', 'spine'), 'spine'),
        (('--set', 'model'), 'KEY=VALUE'),
        (('--keep-map', -1), '--keep-map: -1'),
        (('--keep-map', 0.3, '--local'), '--keep-map: it chooses'),
    ],
)
def test_sensitivity_refuses(run, capsys, arguments, words):
    assert run('sensitivity', *arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith('q3d_plugin')]
    assert len(error) == 1 and words in error[0]


def test_sweep_goes_on_where_it_stopped(run, tmp_path, checkpoint, capsys):
    bench = ToyBench(checkpoint=checkpoint)
    assert run('sweep', '--grid', 'weight.bits=8,3', bench=bench) == 0
    assert bench.evaluated == 3  # float, and two recipes
    first = json.loads((tmp_path / 'out' / 'sweep.json').read_text())
    again = ToyBench(checkpoint=checkpoint)
    assert run('sweep', '--grid', 'weight.bits=8,3,2', bench=again) == 0
    assert again.evaluated == 1
    second = json.loads((tmp_path / 'out' / 'sweep.json').read_text())
    assert second['entries'][:2] == first['entries'] and second['float'] == first['float']
    for measure in ('mAP', 'NDS'):
        assert (tmp_path / 'out' / f'{measure}.png').is_file()
    assert 'weight.bits=2' in capsys.readouterr().out


def test_a_recipe_of_a_sweep_has_the_result_that_it_has_alone(run, tmp_path, checkpoint):
    run('sweep', '--grid', 'weight.bits=2,8', 'skip=none,head', bench=ToyBench(checkpoint=checkpoint))
    for entry in json.loads((tmp_path / 'out' / 'sweep.json').read_text())['entries']:
        alone = ToyBench(recipe=Recipe.from_dict(entry['recipe']))
        alone.prepare(alone.recipe)
        assert entry['result']['mAP'] == pytest.approx(alone.evaluate()['mAP'], rel=1e-6)


def test_sweep_by_l1(run, tmp_path):
    assert run('sweep', '--grid', 'weight.bits=8,3', '--metric', 'l1', '--frames', 2) == 0
    found = json.loads((tmp_path / 'out' / 'sweep.json').read_text())['entries']
    errors = [e['result']['relative_l1'] for e in found]
    assert 0 < errors[0] < errors[1]


def test_sweep_refuses_another_model_another_recipe_and_unknown_keys(run, tmp_path, checkpoint, capsys):
    assert run('sweep', '--grid', 'weight.bits=8') == 0
    before = (tmp_path / 'out' / 'sweep.json').read_text()
    other = ToyBench(checkpoint=checkpoint, recipe=toy_recipe(activation={'bits': 5}))
    assert run('sweep', '--grid', 'weight.bits=8', bench=other) == 2
    assert 'another base recipe' in capsys.readouterr().err
    torch.save({'w': torch.zeros(3)}, checkpoint)
    assert run('sweep', '--grid', 'weight.bits=8') == 2
    assert 'another checkpoint' in capsys.readouterr().err
    assert run('sweep', '--grid', 'weight.bit=8') == 2
    assert "did you mean 'weight.bits'" in capsys.readouterr().err
    assert run('sweep', '--grid', 'skip=spine') == 2
    assert 'spine' in capsys.readouterr().err
    assert (tmp_path / 'out' / 'sweep.json').read_text() == before
    assert run('sweep', '--grid', 'weight.bits=8', '--fresh') == 0


def test_report_of_an_unfinished_run(tmp_path, capsys):
    bench = ToyBench()
    bench.prepare(bench.recipe)
    write_run(str(tmp_path), bench.model, bench.recipe, {'framework': 'toy'})
    assert report.main([str(tmp_path)]) == 0
    assert 'Not evaluated yet' in (tmp_path / 'report.html').read_text()
    assert report.main([str(tmp_path / 'nowhere')]) == 2
    assert 'nowhere' in capsys.readouterr().err
