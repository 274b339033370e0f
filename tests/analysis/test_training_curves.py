"""Curves of a training: what they show, and that it can be read with a hundred layers."""

import math
import random

import pytest

pytest.importorskip('matplotlib')

from q3d_plugin.analysis import report, training_curves
from q3d_plugin.analysis.run_files import Run


def layer_names(count):
    return [f'pts_middle_encoder.encoder_layers.encoder_layer{i % 7}.{i}.conv1' for i in range(count)]


def training(layers=100, epochs=4, validated=True):
    """The content of a ``training.json``; the ranges of some inputs move far."""
    chance = random.Random(0)
    names, entries = layer_names(layers), []
    speed = {name: chance.gauss(0, 0.1) for name in names}
    for i, name in enumerate(names[:3]):
        speed[name] = (-1) ** i * (1.0 + i / 10)
    for epoch in range(epochs + 1):
        rows = []
        for i, name in enumerate(names):
            clipped = None if epoch == 0 else i / 1000 * epoch
            common = {'name': name, 'clipped': clipped, 'values': 10}
            rows.append(
                {**common, 'tensor': 'input', 'range': 2 * math.exp(speed[name] * epoch), 'changed': None}
            )
            changed = None if epoch == 0 else (i + 1) / 200 / epoch
            rows.append({**common, 'tensor': 'weight', 'range': 1 + i, 'clipped': 0.0, 'changed': changed})
        counted = epoch > 0
        totals = {
            'clipped_activations': 0.0123 * epoch if counted else None,
            'clipped_weights': 0.0,
            'changed_codes': 0.25 / epoch if counted else None,
        }
        losses = {'loss': 5.0 - epoch} if counted else {}
        entries.append(
            {'epoch': epoch, 'step': 10 * epoch, 'totals': totals, 'layers': rows, 'losses': losses}
        )
    found = [{'epoch': e, 'step': 10 * e, 'mAP': 0.5 + e / 100, 'NDS': 0.4} for e in range(1, epochs + 1)]
    return {'epochs': entries, 'validations': found if validated else []}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn."""
    made, png = [], training_curves.png
    monkeypatch.setattr(training_curves, 'png', lambda figure, *a: made.append(figure) or png(figure, *a))
    return made


def all_charts(content):
    yield training_curves.range_chart(content['epochs'])
    yield training_curves.clipping_chart(content['epochs'])
    yield training_curves.progress_chart(content)


def lines_of(axes):
    """Label -> points, of the lines that have a label of their own."""
    lines = [line for line in axes.lines if not line.get_label().startswith('_')]
    return {line.get_label(): dict(zip(*line.get_data())) for line in lines}


def test_ranges_are_relative_to_the_start_and_those_that_move_most_are_named(drawn):
    content = training()
    training_curves.range_chart(content['epochs'])
    inputs, weights = drawn[0].axes
    shown = lines_of(inputs)
    assert set(layer_names(3)) < set(shown) and len(shown) == training_curves.NAMED + 1
    assert '94 other layers' in shown
    name = layer_names(1)[0]
    rows = [next(r for r in e['layers'] if r['name'] == name) for e in content['epochs']]
    expected = {e['epoch']: r['range'] / rows[0]['range'] for e, r in zip(content['epochs'], rows)}
    assert shown[name] == pytest.approx(expected)
    # All layers are there, in grey where they are not named.
    curves = [line for line in inputs.lines if len(line.get_xdata()) == len(content['epochs'])]
    assert len(curves) == 100
    assert 'start' in inputs.get_ylabel() and 'epoch' in inputs.get_xlabel()
    assert inputs.get_title(loc='left') == 'Ranges of inputs'
    # Weights did not move at all: the axis has an extent all the same.
    low, high = weights.get_ylim()
    assert low < 0.985 and high > 1.015 and set(lines_of(weights)) == {'100 layers'}


def test_shares_are_in_per_cent_with_all_layers_together(drawn):
    content = training()
    training_curves.clipping_chart(content['epochs'])
    training_curves.progress_chart(content)
    (inputs, weights), (changed, metrics) = drawn[0].axes, drawn[1].axes
    assert lines_of(inputs)['all layers together'] == pytest.approx({e: 1.23 * e for e in range(1, 5)})
    assert lines_of(weights)['all layers together'] == {e: 0 for e in range(5)}
    assert lines_of(inputs)[layer_names(100)[-1]] == pytest.approx({e: 9.9 * e for e in range(1, 5)})
    assert lines_of(changed)['all layers together'] == pytest.approx({e: 25 / e for e in range(1, 5)})
    assert lines_of(metrics)['mAP'] == pytest.approx({e: 50 + e for e in range(1, 5)})
    assert lines_of(metrics)['NDS'] == pytest.approx({e: 40 for e in range(1, 5)})
    assert all('%' in axes.get_ylabel() for axes in (inputs, weights, changed, metrics))


def test_without_validation_the_loss_is_shown(drawn):
    training_curves.progress_chart(training(validated=False))
    assert lines_of(drawn[0].axes[1])['loss'] == {e: 5 - e for e in range(1, 5)}


@pytest.mark.parametrize('layers, epochs', [(1, 1), (100, 1), (100, 4), (130, 40)])
@pytest.mark.filterwarnings('error')
def test_legends_and_titles_are_inside_and_cover_no_line(drawn, layers, epochs):
    for picture in all_charts(training(layers, epochs)):
        assert picture.startswith(b'\x89PNG')
    for made in drawn:
        made.draw_without_rendering()
        for axes in made.axes:
            legend, plot = axes.get_legend().get_window_extent(), axes.get_window_extent()
            assert legend.y1 <= plot.y0 and legend.y0 >= made.bbox.y0 and legend.x1 <= made.bbox.x1
            # The label of the axis is between them.
            label = axes.xaxis.label.get_window_extent()
            assert legend.y1 <= label.y0 and plot.height > 0.4 * made.bbox.height
        left, right = (axes.get_legend().get_window_extent() for axes in made.axes)
        assert left.x1 <= right.x0


@pytest.mark.parametrize('end', [0.0, -1.0, 1e-6, 1e9])
@pytest.mark.filterwarnings('error')
def test_a_range_that_is_lost_is_drawn_as_far_as_it_goes(drawn, end):
    content = training(5, 2)
    for row in content['epochs'][2]['layers']:
        row['range'] = end
    # As in a file in which a range was null: infinities are written so.
    content['epochs'][1]['layers'][0]['range'] = None
    training_curves.range_chart(content['epochs'])
    low, high = drawn[0].axes[0].get_ylim()
    assert 0 < low < 1 < high


def page_of(tmp_path, content):
    run = Run(tmp_path)
    run.training = content
    return report.build(run)


def test_the_page_shows_curves_and_figures(tmp_path):
    page = page_of(tmp_path, training())
    section = page.partition('<h2>Training</h2>')[2].partition('<h2>')[0]
    assert section.count('data:image/png;base64,') == 3
    header, *rows = section.partition('</table>')[0].split('<tr>')[1:]
    assert 'clipped inputs' in header and len(rows) == 5
    for words in ('3.69%', '8.33%', '0.5300', '2.0000'):
        assert f'>{words}<' in rows[3], words
    assert section.count(f'>{layer_names(100)[-1]}<') == 2


def test_a_training_that_has_just_begun_has_figures_alone(tmp_path):
    content = training(3, 0)
    page = page_of(tmp_path, content)
    assert 'data:image/png' not in page and '<summary>Every range</summary>' in page
    for empty in (None, {'epochs': [], 'validations': []}):
        assert 'No training.json' in page_of(tmp_path, empty)


def test_a_validation_between_two_records_has_a_line_of_its_own(tmp_path):
    content = training(3, 2)
    content['validations'].append({'epoch': 1.5, 'step': 15, 'mAP': 0.7777, 'NDS': None})
    section = page_of(tmp_path, content).partition('<h2>Training</h2>')[2].partition('</table>')[0]
    lines = section.split('<tr>')[2:]
    assert len(lines) == 4 and '>1.5<' in lines[2] and '0.7777' in lines[2]
