"""Whether a quantized checkpoint goes with a recipe, in every format that was ever written."""

from pathlib import Path

import pytest
import torch
from torch import nn

from q3d_plugin import checkpoints, lifecycle
from q3d_plugin.errors import Q3DError
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import quantize_

DATA = Path(__file__).parent / 'data'
ANY = dict(target='simulation')


def configured(recipe):
    """The model of the stored checkpoints."""
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    model = quantize_(nn.Sequential(*layers)).eval()
    if recipe.include:
        model[3].float_by_default = 'the last layer of these checkpoints'
    lifecycle.configure(model, recipe)
    return model


def check(made, mine, state=None, source='checkpoint'):
    """Checks a checkpoint that was made with the first recipe against the second one."""
    mine = Recipe.from_dict(mine)
    meta = {checkpoints.META_KEY: checkpoints.stamp(Recipe.from_dict(made))}
    checkpoints.check_recipe_of(meta, state or {}, configured(mine), mine, source)


def test_another_recipe_is_refused_and_every_difference_listed():
    given = dict(ANY, weight=dict(bits=4), skip=['3'], activation=dict(calibrator='max'))
    with pytest.raises(Q3DError) as caught:
        check(given, ANY, source="checkpoint 'q.pth'")
    message = str(caught.value)
    assert message.startswith("checkpoint 'q.pth': it was quantized with another recipe")
    for difference in (
        'recipe.weight.bits: 4 and 8',
        "recipe.skip: ['3'] and []",
        "recipe.activation.calibrator: 'max' and 'mse'",
        "differ for '0'",
    ):
        assert difference in message
    assert message.count(' and ') == 3 + 1  # 'checkpoint and config'


def test_mode_calibration_and_training_may_differ():
    given = dict(ANY, mode='qat', calibration=dict(frames=7, seed=3, split='val'), weight=dict(bits=4))
    given['training'] = dict(ranges=dict(scale='linear'))
    check(given, dict(ANY, weight=dict(bits=4)))
    with pytest.raises(Q3DError, match='recipe.weight.bits: 4 and 8[.]'):
        check(given, ANY)


def check_training(made, mine, source='checkpoint', **stamped):
    meta = {checkpoints.META_KEY: {**checkpoints.stamp(Recipe.from_dict(made)), **stamped}}
    checkpoints.check_training_of(meta, Recipe.from_dict(mine), source)


def test_a_training_resumes_with_its_own_recipe_alone():
    made = dict(ANY, mode='qat', training=dict(ranges=dict(scale='linear'), schedule=dict(observe_until=2)))
    check_training(made, dict(made, calibration=dict(frames=7)))
    # What widths and patterns mean is compared elsewhere, by what they mean for the layers.
    check_training(made, dict(made, weight=dict(bits=4)))
    with pytest.raises(Q3DError) as caught:
        check_training(made, dict(ANY, mode='qat', skip='0', calibration=dict(frames=7)), 'a.pth')
    message = str(caught.value)
    assert message.startswith('a.pth: a training cannot resume with another recipe (checkpoint and config): ')
    for difference in (
        "recipe.training.ranges.scale: 'linear' and 'log2'",
        'recipe.training.schedule.observe_until: 2.0 and None',
        "recipe.skip: [] and ['0']",
    ):
        assert difference in message
    assert 'calibration' not in message
    with pytest.raises(Q3DError, match="recipe.mode: 'ptq' and 'qat'.*start a new training from it"):
        check_training(ANY, dict(ANY, mode='qat'))
    for meta in (None, {}, {checkpoints.META_KEY: {}}):
        with pytest.raises(Q3DError, match='a.pth: a quantized training cannot resume from it'):
            checkpoints.check_training_of(meta, Recipe.from_dict(dict(mode='qat')), 'a.pth')


def test_older_trainings_had_fixed_ranges():
    made = Recipe.from_dict(dict(ANY, mode='qat')).to_dict()
    del made['training']
    meta = {checkpoints.META_KEY: {'recipe': made, 'format': 3}}
    fixed = dict(ranges=dict(weight='fixed', activation='fixed'))
    checkpoints.check_training_of(meta, Recipe.from_dict(dict(ANY, mode='qat', training=fixed)))
    with pytest.raises(Q3DError, match=r"training\.ranges\.weight: 'fixed' and 'learned'"):
        checkpoints.check_training_of(meta, Recipe.from_dict(dict(ANY, mode='qat')))
    # Today's have it always.
    meta[checkpoints.META_KEY]['format'] = checkpoints.FORMAT
    checkpoints.check_training_of(meta, Recipe.from_dict(dict(ANY, mode='qat')))


@pytest.mark.parametrize(
    'made, mine',
    [
        (dict(skip=['0']), dict(skip='0')),
        (dict(skip=['0', '3']), dict(skip=['3', '0'])),
        (dict(skip=['0']), dict(overrides=[dict(layers='0', weight=None, activation=None)], skip=['0'])),
        (dict(smoothquant=dict(alpha=0.5)), dict(smoothquant=dict(alpha=0.5, grid=[0.3]))),
    ],
)
def test_other_words_that_mean_the_same_for_every_layer_pass(made, mine):
    check(made, mine)


def test_a_checkpoint_for_another_target_is_refused():
    with pytest.raises(Q3DError) as caught:
        check(dict(target='openvino'), {}, source="checkpoint 'q.pth'")
    assert str(caught.value).startswith(
        "checkpoint 'q.pth': it was made for another target: 'openvino', and recipe.target is 'tensorrt'; "
        "'openvino' would work"
    )


@pytest.mark.parametrize('meta', [None, {}, {'epoch': 3}, {checkpoints.META_KEY: {}}])
def test_ranges_without_a_recipe_are_refused(meta):
    with pytest.raises(Q3DError, match='it has ranges but no recipe'):
        checkpoints.check_recipe_of(meta, {}, configured(Recipe()), Recipe())


def test_an_entry_that_this_version_does_not_know_is_refused():
    stamped = checkpoints.stamp(Recipe())
    stamped['recipe']['rounding'] = 'nearest'
    with pytest.raises(Q3DError, match='its recipe cannot be read: recipe.rounding: unknown key'):
        checkpoints.check_recipe_of({checkpoints.META_KEY: stamped}, {}, configured(Recipe()), Recipe())


def test_older_checkpoints_quantize_what_is_float_by_default_today():
    content = torch.load(DATA / 'format2_tensorrt.pth', weights_only=True)
    place = content['meta'], content['state_dict']
    for include, fits in ((['3'], True), ([], False)):
        recipe = Recipe.from_dict(dict(include=include))
        model = configured(Recipe.from_dict(dict(include=['3'])))
        if fits:
            checkpoints.check_recipe_of(*place, model, recipe)
        else:
            with pytest.raises(Q3DError, match=r"recipe\.include: \['\*'\] and \[\]\. They differ for '3'"):
                checkpoints.check_recipe_of(*place, model, recipe)


def test_a_newer_format_is_refused_with_the_version_to_install():
    stamped = {**checkpoints.stamp(Recipe()), 'format': checkpoints.FORMAT + 1, 'version': '9.8.7'}
    with pytest.raises(Q3DError, match=r'newer version of this plugin \(9\.8\.7'):
        checkpoints.check_recipe_of({checkpoints.META_KEY: stamped}, {}, configured(Recipe()), Recipe())


@pytest.mark.parametrize(
    'name, recipe',
    [
        ('format1_unsigned', dict(target='openvino')),
        ('format1_unsigned', dict(target='simulation')),
        ('format1_signed', dict(activation=dict(unsigned=False))),
        ('format1_signed', {}),
        ('format2_tensorrt', {}),
        ('format2_openvino', dict(target='openvino')),
        ('format3_include', dict(include=['3'])),
        ('format4_training', dict(include=['3'])),
        ('format4_training', dict(include=['3'], mode='qat', training=dict(ranges=dict(scale='linear')))),
    ],
)
def test_stored_checkpoints_of_every_format_compute_what_they_did(name, recipe):
    content = torch.load(DATA / f'{name}.pth', weights_only=True)
    recipe = Recipe.from_dict(recipe)
    model = configured(recipe)
    state = content['state_dict']
    checkpoints.check_recipe_of(content['meta'], state, model, recipe)
    checkpoints.check_state_dict(model, state)
    model.load_state_dict(state)
    with torch.no_grad():
        output = model(content['meta']['input'])
    assert torch.allclose(output, content['meta']['output'], rtol=1e-5, atol=1e-6)


def test_an_unsigned_checkpoint_from_before_targets_is_refused_for_a_signed_engine():
    content = torch.load(DATA / 'format1_unsigned.pth', weights_only=True)
    with pytest.raises(Q3DError) as caught:
        checkpoints.check_recipe_of(
            content['meta'], content['state_dict'], configured(Recipe()), Recipe(), "checkpoint 'old.pth'"
        )
    message = str(caught.value)
    assert message.startswith("checkpoint 'old.pth': it was saved before recipes had a target, and 3.input")
    assert "'openvino'" in message and 'calibrate the float checkpoint anew' in message


def test_there_is_a_stored_checkpoint_of_the_format_that_is_written():
    assert list(DATA.glob(f'format{checkpoints.FORMAT}_*.pth'))


class Cameras(nn.Module):
    """Two sensors, and what fuses them."""

    def __init__(self):
        super().__init__()
        self.lidar, self.cameras, self.fuser = (nn.Conv2d(2, 2, 1) for _ in range(3))


def test_parts_that_a_checkpoint_lacks_altogether_are_named():
    model = quantize_(Cameras())
    state = model.state_dict()
    whole = {k: v for k, v in state.items() if 'quantizer' not in k}
    checkpoints.check_state_dict(model, whole)
    lidar = {k: v for k, v in whole.items() if k.startswith('lidar.')}
    with pytest.raises(Q3DError, match='^a.pth: .* no weights at all of cameras, fuser, which .*4 of 6 entr'):
        checkpoints.check_state_dict(model, lidar, 'a.pth')
    # Other names for the same parts are a mistake of another kind, and so is the checkpoint of another model.
    for other in ({k.replace('cameras', 'camera'): v for k, v in whole.items()}, {'x.weight': torch.ones(1)}):
        with pytest.raises(Q3DError, match="^a.pth: of another model: '.*' is missing"):
            checkpoints.check_state_dict(model, other, 'a.pth')
