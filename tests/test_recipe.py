"""The recipe: what is refused and how, which spec a layer gets, and the trip to a checkpoint and back."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from q3d_plugin.errors import Q3DError
from q3d_plugin.recipe import (
    CALIBRATORS,
    RANGE_KINDS,
    WEIGHT_CALIBRATORS,
    ActivationSpec,
    LayerFacts,
    Place,
    Recipe,
    WeightSpec,
    differences,
    matches,
)


def refused(given_recipe, path='recipe'):
    """The message of the error that the recipe causes."""
    with pytest.raises(Q3DError) as caught:
        Recipe.from_dict(given_recipe, Place(path))
    return str(caught.value)


def layers_of(names, weighted=None):
    """Dense convolutions of these names; additions where they are not among ``weighted``."""
    weighted = names if weighted is None else weighted
    return [
        LayerFacts(n, *(('convolution', True) if n in weighted else ('elementwise', False))) for n in names
    ]


@pytest.mark.parametrize(
    'given_recipe, place, near',
    [
        (dict(wieght={}), 'recipe.wieght', 'weight'),
        (dict(weight=dict(bit=8)), 'recipe.weight.bit', 'bits'),
        (dict(activation=dict(calibrater='mse')), 'recipe.activation.calibrater', 'calibrator'),
        (dict(calibration=dict(frame=3)), 'recipe.calibration.frame', 'frames'),
        (dict(overrides=[dict(layer='a')]), 'recipe.overrides[0].layer', 'layers'),
        (
            dict(overrides=[dict(layers='a'), dict(layers='b', weight=dict(percentil=9))]),
            'recipe.overrides[1].weight.percentil',
            'percentile',
        ),
        (
            dict(overrides=[dict(layers='a', activation=dict(unsinged=True))]),
            'recipe.overrides[0].activation.unsinged',
            'unsigned',
        ),
    ],
)
def test_unknown_keys_are_refused_with_their_path_and_a_near_match(given_recipe, place, near):
    message = refused(given_recipe)
    assert message.startswith(f'{place}: unknown key')
    assert f'did you mean {near!r}' in message


def test_the_path_begins_where_the_caller_says():
    message = refused(dict(weight=dict(bit=8)), 'custom_hooks[2].recipe')
    assert message.startswith('custom_hooks[2].recipe.weight.bit:')


def _nested(place, value):
    """A recipe that has ``value`` at a dotted place below ``weight``, ``activation`` or an override."""
    head, key = place.rsplit('.', 1)
    if head.startswith('overrides'):
        return dict(overrides=[{'layers': '*', head.split('.')[1]: {key: value}}])
    return {head: {key: value}}


PARTS = ['weight', 'activation', 'overrides[0].weight', 'overrides[0].activation']


@pytest.mark.parametrize('part', PARTS)
@pytest.mark.parametrize('bits', [0, 1, 17, 33, -8, True, 8.0, '8', None])
def test_bits_that_are_no_width_are_refused(part, bits):
    message = refused(_nested(f'{part}.bits', bits))
    assert message.startswith(f'recipe.{part}.bits: {bits!r} was given')
    assert '2 to 16' in message


@pytest.mark.parametrize('part', ['weight', 'activation'])
def test_every_width_from_2_to_16_is_accepted(part):
    for bits in range(2, 17):
        assert getattr(Recipe.from_dict({'target': 'simulation', part: dict(bits=bits)}), part).bits == bits


@pytest.mark.parametrize('part', PARTS)
def test_unknown_calibrators_are_refused_with_a_near_match(part):
    message = refused(_nested(f'{part}.calibrator', 'precentile'))
    assert message.startswith(f'recipe.{part}.calibrator: ')
    assert "did you mean 'percentile'" in message


@pytest.mark.parametrize('part', ['activation', 'overrides[0].activation'])
def test_ranges_are_static_or_dynamic(part):
    message = refused(_nested(f'{part}.range', 'dynamc'))
    assert (
        message.startswith(f"recipe.{part}.range: 'dynamc' was given") and "did you mean 'dynamic'" in message
    )


@pytest.mark.parametrize(
    'key, value, works',
    [
        ('ranges.weight', 'learnt', "did you mean 'learned'"),
        ('ranges.activation', None, "'fixed', 'moving', 'learned' would work"),
        ('ranges.scale', 'log', "'linear', 'log2'"),
        ('ranges.lr_factor', 0, 'above 0'),
        ('ranges.momentum', 1, 'not including, 1'),
        ('schedule.activations_from', -1, 'epochs from 0 up'),
        ('schedule.learn_until', 'last', 'epochs from 0 up'),
        ('distillation.heatmap', -0.5, 'from 0 up'),
        ('distillation.teacher', 3, 'a checkpoint file would work'),
    ],
)
def test_training_that_cannot_work_is_refused(key, value, works):
    section, name = key.split('.')
    message = refused({'training': {section: {name: value}}})
    assert message.startswith(f'recipe.training.{key}: {value!r} was given') and works in message


@pytest.mark.parametrize('part', ['weight', 'overrides[0].weight'])
def test_entropy_is_refused_for_weights_and_what_works_is_listed(part):
    message = refused(_nested(f'{part}.calibrator', 'entropy'))
    assert message.startswith(f"recipe.{part}.calibrator: 'entropy' was given")
    assert all(repr(c) in message for c in WEIGHT_CALIBRATORS)


def test_every_calibrator_is_accepted_where_it_works():
    for calibrator in CALIBRATORS:
        recipe = Recipe.from_dict(dict(target='simulation', activation=dict(calibrator=calibrator)))
        assert recipe.activation.calibrator == calibrator
    for calibrator in WEIGHT_CALIBRATORS:
        assert (
            Recipe.from_dict(dict(target='simulation', weight=dict(calibrator=calibrator))).weight.calibrator
            == calibrator
        )


@pytest.mark.parametrize('value', [0, -1, 100.5, True, '99', float('nan'), float('inf'), None])
@pytest.mark.parametrize('part', ['weight', 'activation'])
def test_percentiles_out_of_range_are_refused(part, value):
    assert refused({part: dict(percentile=value)}).startswith(f'recipe.{part}.percentile: ')


@pytest.mark.parametrize('value', [1, 0, 'yes', None, 'Auto'])
def test_unsigned_is_auto_true_or_false(value):
    message = refused(dict(activation=dict(unsigned=value)))
    assert message.startswith('recipe.activation.unsigned: ')
    assert "'auto', True, False" in message


@pytest.mark.parametrize('frames', [0, -5, 2.5, True, '300'])
def test_frames_below_one_are_refused(frames):
    message = refused(dict(calibration=dict(frames=frames)))
    assert message.startswith(f'recipe.calibration.frames: {frames!r} was given')
    assert 'from 1 up' in message


@pytest.mark.parametrize(
    'given_recipe, place, words',
    [
        (dict(calibration=dict(seed=-1)), 'recipe.calibration.seed', ['from 0 up']),
        (dict(calibration=dict(split='trian')), 'recipe.calibration.split', ["did you mean 'train'"]),
        (dict(mode='PTQ'), 'recipe.mode', ["'float'", "'ptq'", "'qat'"]),
        (dict(mode=None), 'recipe.mode', ["'float'", "'ptq'", "'qat'"]),
        (dict(weight=8), 'recipe.weight', ['bits', 'calibrator']),
        (dict(calibration=None), 'recipe.calibration', ['frames']),
        (dict(skip=3), 'recipe.skip', ['list']),
        (dict(skip=['a', 4]), 'recipe.skip', ['list']),
        (dict(skip=['']), 'recipe.skip', ['list']),
        (dict(overrides=dict(layers='a')), 'recipe.overrides', ['list']),
        (dict(overrides='a'), 'recipe.overrides', ['list']),
        (dict(overrides=['a']), 'recipe.overrides[0]', ['layers']),
        (dict(overrides=[dict(weight=dict(bits=4))]), 'recipe.overrides[0].layers', ['missing']),
        ([], 'recipe', ['weight', 'activation', 'skip']),
    ],
)
def test_wrong_values_are_refused_with_what_would_work(given_recipe, place, words):
    message = refused(given_recipe)
    assert message.startswith(f'{place}: ')
    for word in words:
        assert word in message


def test_nothing_given_is_the_default():
    assert Recipe.from_dict(None) == Recipe.from_dict({}) == Recipe()


def test_the_given_dictionary_is_not_changed():
    config = dict(weight=dict(bits=4, percentile=99), skip='a', overrides=[dict(layers='b', weight=None)])
    before = copy.deepcopy(config)
    Recipe.from_dict({'target': 'simulation', **config}).plan('a.0')
    assert config == before


@pytest.mark.parametrize(
    'pattern, name, means',
    [
        ('backbone', 'backbone', True),
        ('backbone', 'backbone.blocks.0', True),
        ('backbone', 'backbone2.blocks.0', False),
        ('back', 'backbone.blocks.0', False),
        ('blocks', 'backbone.blocks.0', False),
        ('*blocks', 'backbone.blocks.0', True),
        ('*.0', 'backbone.blocks.0', True),
        ('*.0', 'backbone.blocks.0.conv', True),
        ('*.0', 'backbone.blocks.10', False),
        ('backbone.*.1', 'backbone.blocks.5.1', True),
        ('head.?', 'head.3', True),
        ('head.?', 'head.31', False),
        ('Head', 'head', False),
    ],
)
def test_patterns(pattern, name, means):
    assert matches(pattern, name) is means


def test_a_pattern_for_no_layer_is_refused_with_near_names():
    names = ['backbone.blocks.0.0', 'neck.deblocks.0.0', 'bbox_head.heatmap.1']
    recipe = Recipe.from_dict(dict(target='simulation', skip=['neck', '*heatmaps.1']))
    with pytest.raises(Q3DError) as caught:
        recipe.check(layers_of(names))
    message = str(caught.value)
    assert message.startswith("recipe.skip[1]: '*heatmaps.1' matches none of the 3")
    assert "did you mean 'heatmap.1'" in message


def test_a_pattern_of_an_override_for_no_layer_is_refused_with_its_place():
    overrides = [dict(layers='backbone'), dict(layers=['backbone', 'nekc.deblocks'], weight=None)]
    recipe = Recipe.from_dict(dict(target='simulation', overrides=overrides), Place('hook.recipe'))
    with pytest.raises(Q3DError) as caught:
        recipe.check(layers_of(['backbone.0', 'neck.deblocks.0']))
    message = str(caught.value)
    assert message.startswith("hook.recipe.overrides[1].layers[1]: 'nekc.deblocks' matches none")
    assert 'neck.deblocks' in message.split('did you mean')[1]


def test_patterns_for_a_layer_or_what_holds_it_pass():
    recipe = Recipe.from_dict(dict(target='simulation', skip=['a', 'b.0'], overrides=[dict(layers='*c')]))
    recipe.check(layers_of(['a.0', 'b.0', 'b.c']))
    with pytest.raises(Q3DError, match=r'skip\[1\]'):
        recipe.check(layers_of(['a.0', 'b.c']))


def test_a_later_override_wins_and_changes_only_its_fields():
    recipe = Recipe.from_dict(
        dict(
            target='simulation',
            weight=dict(calibrator='mse'),
            overrides=[
                dict(layers='a', weight=dict(bits=4), activation=dict(bits=16, calibrator='max')),
                dict(layers=['x', 'a.1'], weight=dict(bits=6), activation=dict(bits=10)),
            ],
        )
    )
    assert recipe.plan('a.0').weight == WeightSpec(bits=4, calibrator='mse')
    assert recipe.plan('a.1').weight == WeightSpec(bits=6, calibrator='mse')
    assert recipe.plan('a.1').activation == ActivationSpec(bits=10, calibrator='max')
    assert recipe.plan('b').weight == WeightSpec(calibrator='mse')
    assert recipe.plan('b').activation == ActivationSpec()


def test_none_leaves_a_part_float_and_an_override_can_bring_it_back():
    recipe = Recipe.from_dict(
        dict(
            target='simulation',
            weight=None,
            overrides=[
                dict(layers='a', activation=None),
                dict(layers='b', weight=dict(bits=4)),
            ],
        )
    )
    both_float = recipe.plan('a')
    assert both_float.weight is None and both_float.activation is None
    assert both_float.reason == 'left float by the recipe'
    assert recipe.plan('b').weight == WeightSpec(bits=4)
    rest = recipe.plan('c')
    assert rest.weight is None and rest.activation == ActivationSpec() and rest.reason == ''


def test_skip_is_stronger_than_overrides_and_says_which_pattern_it_was():
    recipe = Recipe.from_dict(
        dict(target='simulation', skip=['z', 'a'], overrides=[dict(layers='a', weight=dict(bits=4))])
    )
    plan = recipe.plan('a.0')
    assert plan.weight is None and plan.activation is None
    assert "'a'" in plan.reason


def _specs(calibrators, **more):
    optional = dict(
        bits=st.integers(2, 16),
        calibrator=st.sampled_from(calibrators),
        percentile=st.floats(1, 100),
        **more,
    )
    return st.none() | st.fixed_dictionaries({}, optional=optional)


NAMES = st.text('abc.*', min_size=1, max_size=5)
WEIGHTS = _specs(WEIGHT_CALIBRATORS)
ACTIVATIONS = _specs(
    CALIBRATORS,
    unsigned=st.sampled_from(['auto', True, False]),
    range=st.sampled_from(['static', 'dynamic']),
)
OVERRIDES = st.fixed_dictionaries(
    dict(layers=NAMES | st.lists(NAMES, min_size=1, max_size=2)),
    optional=dict(weight=WEIGHTS, activation=ACTIVATIONS),
)
KINDS = st.sampled_from(RANGE_KINDS)
EPOCHS = st.integers(0, 20) | st.floats(0, 20)
TRAININGS = st.fixed_dictionaries(
    {},
    optional=dict(
        ranges=st.fixed_dictionaries(
            {},
            optional=dict(
                weight=KINDS,
                activation=KINDS,
                scale=st.sampled_from(['linear', 'log2']),
                lr_factor=st.floats(1e-3, 1e3),
                momentum=st.floats(0, 0.999),
            ),
        ),
        schedule=st.fixed_dictionaries(
            {}, optional=dict(activations_from=EPOCHS, observe_until=st.none() | EPOCHS, learn_until=EPOCHS)
        ),
        distillation=st.none()
        | st.fixed_dictionaries({}, optional=dict(heatmap=EPOCHS, teacher=st.none() | NAMES)),
    ),
)
RECIPES = st.fixed_dictionaries(
    {},
    optional=dict(
        mode=st.sampled_from(['float', 'ptq', 'qat']),
        weight=WEIGHTS,
        activation=ACTIVATIONS,
        skip=NAMES | st.lists(NAMES, max_size=3),
        overrides=st.lists(OVERRIDES, max_size=3),
        calibration=st.fixed_dictionaries(
            {}, optional=dict(frames=st.integers(1, 999), seed=st.integers(0, 9))
        ),
        training=TRAININGS,
    ),
)


@given(RECIPES)
@settings(max_examples=150, deadline=None)
def test_a_recipe_survives_the_trip_through_json(config):
    recipe = Recipe.from_dict({'target': 'simulation', **config})
    plain = json.loads(json.dumps(recipe.to_dict()))
    again = Recipe.from_dict({'target': 'simulation', **plain})
    assert again == recipe
    assert plain == recipe.to_dict()
    assert differences(plain, again.to_dict()) == []
    for name in ('a', 'a.b', 'c.a.b'):
        assert again.plan(name) == recipe.plan(name)


def _leaves(value, path):
    if isinstance(value, dict):
        for key in value:
            yield from _leaves(value[key], (*path, key))
    else:
        yield path, value


def test_each_changed_value_is_the_one_difference():
    plain = Recipe.from_dict(dict(target='simulation', skip=['a'])).to_dict()
    leaves = list(_leaves(plain, ()))
    assert len(leaves) == 27
    for path, value in leaves:
        other = copy.deepcopy(plain)
        holder = other
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = 'changed'
        assert differences(plain, other) == [f'recipe.{".".join(path)}: {value!r} and {"changed"!r}']


def test_a_part_on_one_side_only_is_a_difference():
    one, other = Recipe.from_dict(dict(weight=None)).to_dict(), Recipe().to_dict()
    found = differences(one, other)
    assert len(found) == 1 and found[0].startswith('recipe.weight: None and ')
    assert differences({}, {'new': 1}, Place('r')) == ['r.new: None and 1']
    assert differences({'gone': 1}, {}, Place('r')) == ['r.gone: 1 and None']


# SmoothQuant.

NAMES = ['net.a', 'net.b', 'head.a', 'head.add']


def smooth_refused(given_recipe, names=NAMES, weighted=NAMES[:3]):
    with pytest.raises(Q3DError) as caught:
        Recipe.from_dict(given_recipe).check(layers_of(names, weighted))
    return str(caught.value)


@pytest.mark.parametrize('alpha', [-0.1, 1.01, 5, True, 'serch', '0.5', None, float('nan'), [0.5]])
@pytest.mark.parametrize('place', ['alpha', 'grid[1]', 'overrides[0].alpha'])
def test_alpha_outside_of_0_to_1_is_refused(place, alpha):
    given_recipe = {
        'alpha': dict(alpha=alpha),
        'grid[1]': dict(grid=[0.5, alpha]),
        'overrides[0].alpha': dict(overrides=[dict(layers='a', alpha=alpha)]),
    }[place]
    if place.startswith('overrides') and alpha is None:
        assert (
            Recipe.from_dict(dict(target='simulation', smoothquant=given_recipe))
            .smoothquant.overrides[0]
            .alpha
            is None
        )
        return
    message = refused(dict(smoothquant=given_recipe))
    assert message.startswith(f'recipe.smoothquant.{place}: {alpha!r} was given; a number from 0 to 1')


@pytest.mark.parametrize('alpha', [0, 1, 0.5, 'search'])
def test_alpha_from_0_to_1_and_search_are_accepted(alpha):
    recipe = Recipe.from_dict(dict(target='simulation', smoothquant=dict(alpha=alpha)))
    assert recipe.plan('net.a').smooth.alpha == alpha
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert json.loads(json.dumps(recipe.to_dict())) == recipe.to_dict()


@pytest.mark.parametrize(
    'given_recipe, words',
    [
        (dict(alpa=0.5), ['recipe.smoothquant.alpa: unknown key', "'alpha'"]),
        (dict(mode='statik'), ["recipe.smoothquant.mode: 'statik'", "'static'"]),
        (dict(grid=[]), ['recipe.smoothquant.grid: [] was given']),
        (dict(grid=['search']), ["recipe.smoothquant.grid[0]: 'search' was given"]),
        (dict(layers=[]), ['recipe.smoothquant.layers: []']),
        (dict(layers=[3]), ['recipe.smoothquant.layers: [3]']),
        (dict(overrides={}), ['recipe.smoothquant.overrides: {} was given']),
        (dict(overrides=[dict(alpha=0.1)]), ['recipe.smoothquant.overrides[0].layers: missing']),
        (dict(overrides=[dict(layers='a')]), ['recipe.smoothquant.overrides[0].alpha: missing']),
        (dict(overrides=[dict(layer='a')]), ['recipe.smoothquant.overrides[0].layer: unknown', "'layers'"]),
        (0.5, ['recipe.smoothquant: 0.5 was given', 'alpha, layers']),
    ],
)
def test_mistakes_of_smoothquant_are_named(given_recipe, words):
    message = refused(dict(smoothquant=given_recipe))
    assert all(word in message for word in words), message


def test_a_smoothquant_pattern_for_no_layer_is_refused():
    message = smooth_refused(dict(smoothquant=dict(layers=['net', 'haed'])))
    assert message.startswith("recipe.smoothquant.layers[1]: 'haed' matches none of the 3 layers")
    message = smooth_refused(dict(smoothquant=dict(overrides=[dict(layers='x', alpha=1)])))
    assert message.startswith("recipe.smoothquant.overrides[0].layers[0]: 'x' matches none")
    # An addition has no weight.
    assert 'head.add' in smooth_refused(dict(smoothquant=dict(layers=['head.add'])))


def test_a_smoothquant_pattern_for_skipped_or_float_layers_only_is_refused():
    message = smooth_refused(dict(skip=['*.b', 'head'], smoothquant=dict(layers=['*', 'head.a'])))
    assert message.startswith("recipe.smoothquant.layers[1]: 'head.a' means no layer that is quantized")
    assert "'head.a' is skipped by 'head'" in message
    off = dict(layers='net', weight=None, activation=None)
    message = smooth_refused(dict(overrides=[off], smoothquant=dict(layers='net')))
    assert "'net.a' is left float by the recipe (and 1 more)" in message
    # Where some of the layers are quantized, the others are passed over.
    recipe = Recipe.from_dict(dict(target='simulation', skip=['*.b'], smoothquant=dict(layers='net')))
    recipe.check(layers_of(NAMES, NAMES[:3]))
    assert recipe.plan('net.b').smooth is None and recipe.plan('head.a').smooth is None


def test_each_layer_gets_its_alpha_and_the_last_override_wins():
    smoothquant = dict(
        alpha=0.25,
        layers=['net', 'head'],
        grid=[1, 0.5, 0.5],
        overrides=[dict(layers='head', alpha='search'), dict(layers='*.b', alpha=None)],
    )
    recipe = Recipe.from_dict(dict(target='simulation', smoothquant=smoothquant))
    assert recipe.plan('net.a').smooth.alpha == 0.25 and recipe.plan('net.a').smooth.grid == ()
    assert recipe.plan('head.a').smooth.alpha == 'search' and recipe.plan('head.a').smooth.grid == (0.5, 1.0)
    assert recipe.plan('net.b').smooth is None and recipe.plan('other').smooth is None
    assert recipe.plan('net.a').smooth.mode == 'static'


def test_a_checkpoint_from_before_smoothquant_is_that_of_a_recipe_without():
    old = Recipe().to_dict()
    assert old.pop('smoothquant') is None
    assert differences(old, Recipe().to_dict()) == []
    assert differences(old, Recipe.from_dict(dict(target='simulation', smoothquant={})).to_dict()) != []
