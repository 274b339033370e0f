"""Lists of layers to leave float, against errors that are measured by hand."""

import itertools

import pytest
from analysis_toys import by_hand, calibrated_bench

from q3d_plugin.analysis import sensitivity
from q3d_plugin.analysis.replay import Replay
from q3d_plugin.analysis.skip_list import choose_skips, paste
from q3d_plugin.analysis.switch import Switch
from q3d_plugin.recipe import Recipe


@pytest.fixture
def bench():
    return calibrated_bench()


def test_skip_list_keeps_the_budget_with_no_more_layers_than_needed(bench):
    switch, batches = Switch(bench.model), list(bench.frames('val', 2))
    replay = Replay(bench.model, bench.forward)
    alone, _ = sensitivity.output_errors(switch, replay, batches, {n: {n} for n in switch.names})
    ranking = sorted(switch.names, key=lambda n: alone[n].relative_l1, reverse=True)
    everything = set(switch.names)

    def error_without(names):
        return by_hand(bench, everything.difference(names), batches)

    whole = error_without(())
    found = choose_skips(switch, replay, batches, ranking, 0.6 * whole, 9, 20, trial_frames=2, progress=False)
    assert found.kept
    assert found.lengths[0] == 0 and found.lengths[-1] == len(found.names)
    for length, error in zip(found.lengths, found.errors):
        assert error == pytest.approx(error_without(found.names[:length]), rel=1e-5)
    assert found.errors[0] == pytest.approx(whole, rel=1e-5)
    assert found.errors[-1] == pytest.approx(error_without(found.names), rel=1e-5)
    assert found.errors[-1] <= 0.6 * whole
    # No shorter list of these layers does it.
    for shorter in itertools.combinations(found.names, len(found.names) - 1):
        assert error_without(shorter) > 0.6 * whole
    # A budget that cannot be kept is not said to be.
    short = choose_skips(switch, replay, batches, ranking, 0.0, 2, 1, progress=False)
    assert not short.kept and len(short.names) == 2 and short.lengths == [0, 1, 2]
    assert short.errors[-1] == pytest.approx(error_without(short.names), rel=1e-5)
    assert short.errors[-1] < whole


def test_what_is_pasted_is_what_a_config_reads():
    yaml = pytest.importorskip('yaml')
    base, names = Recipe.from_dict({'skip': ['neck*']}), ['head.0', '*stem']
    python = eval(f'dict({paste(base, names, "float", "mmdet3d")})')
    assert python == {'skip': ['neck*', 'head.0', '*stem']}
    assert yaml.safe_load(paste(base, names, 'float', 'openpcdet')) == {'SKIP': python['skip']}
    assert yaml.safe_load(paste(Recipe(), [], 'float', 'openpcdet')) == {'SKIP': []}
    smooth = yaml.safe_load(paste(base, names, 'standard', 'openpcdet'))['SMOOTHQUANT']
    assert smooth == {'OVERRIDES': [{'LAYERS': names, 'ALPHA': None}]}
    # Nothing to paste is a comment in both languages.
    assert yaml.safe_load(paste(base, [], 'standard', 'openpcdet')) is None
