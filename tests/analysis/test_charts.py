"""Pictures show all that is written in them."""

import pytest

pytest.importorskip('matplotlib')

from q3d_plugin.analysis import charts


@pytest.mark.parametrize('columns', [['mAP'], [f'weight.bits={b}' for b in (8, 6, 4)]])
@pytest.mark.parametrize('label', ['W8A8', 'dense W8A8, SmoothQuant 0.5 on the head but the listed layers'])
@pytest.mark.filterwarnings('error')
def test_labels_of_a_heat_map_are_inside_the_picture(columns, label, monkeypatch):
    drawn = []
    png = charts.png
    monkeypatch.setattr(charts, 'png', lambda made, *a: drawn.append(made) or png(made, *a))
    values = [[0.5 + i / 100 for _ in columns] for i in range(28)]
    picture = charts.heat_map(values, [label] * 28, columns, 'mAP (float 0.5671)')
    assert picture.startswith(b'\x89PNG')
    (made,) = drawn
    made.draw_without_rendering()
    axes, whole = made.axes[0], made.bbox
    for text in (*axes.get_yticklabels(), *axes.get_xticklabels(), axes.title):
        box = text.get_window_extent()
        assert box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0 and box.y1 <= whole.y1
    # The fields are wide enough for the numbers in them.
    number = axes.texts[0].get_window_extent().width
    assert axes.get_window_extent().width / len(columns) > 1.1 * number
