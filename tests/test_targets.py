"""Targets and what they can run: the table, the errors before data is read, and how signedness is settled."""

import pytest
import torch
from torch import nn

from q3d_plugin import lifecycle
from q3d_plugin.coverage import coverage, coverage_table
from q3d_plugin.errors import Q3DError
from q3d_plugin.recipe import FAMILIES, TARGETS, LayerFacts, Place, Recipe
from q3d_plugin.transforms.insert import quantize_

ENGINES = ('tensorrt', 'openvino', 'onnxruntime')


def refused(given, *, layers=None, place=Place()):
    """The error that a recipe causes, at once or against layers."""
    with pytest.raises(Q3DError) as caught:
        recipe = Recipe.from_dict(given, place)
        recipe.check(layers or [])
    return caught.value


def test_every_line_of_the_table_names_its_source_and_a_known_kind_of_layer():
    for target in TARGETS.values():
        assert target.facts
        for rule in target.rules:
            assert rule.source and rule.reason and rule.allowed
            assert set(rule.families) <= set(FAMILIES)


@pytest.mark.parametrize(
    'given, path, words',
    [
        (dict(activation=dict(unsigned=True)), 'recipe.activation.unsigned', ['signed', '2081', 'openvino']),
        (dict(activation=dict(bits=4), weight=dict(bits=4)), 'recipe.activation.bits', ['8', 'simulation']),
        (dict(weight=dict(bits=16)), 'recipe.weight.bits', ['8', 'None for weight']),
        (dict(activation=dict(range='dynamic')), 'recipe.activation.range', ["'static' would work"]),
        (dict(smoothquant=dict(mode='dynamic')), 'recipe.smoothquant.mode', ["'static' would work"]),
        (
            dict(overrides=[dict(layers='a'), dict(layers='*fuser*', activation=dict(bits=16))]),
            'recipe.overrides[1].activation.bits',
            ['16 was given', 'None for activation'],
        ),
    ],
)
def test_a_recipe_that_tensorrt_cannot_run_is_refused_without_a_model(given, path, words):
    error = refused(given)
    assert error.path == path and str(error).startswith(f'{path}: ')
    assert "target 'tensorrt' cannot run" in str(error) and 'would work' in error.hint
    for word in words:
        assert word in str(error)


def test_the_error_carries_path_value_and_hint_as_openpcdet_writes_them():
    error = refused(dict(ACTIVATION=dict(UNSIGNED=True)), place=Place('MODEL.QUANT', upper=True))
    assert (error.path, error.given) == ('MODEL.QUANT.ACTIVATION.UNSIGNED', True)
    assert "TARGET 'tensorrt'" in str(error)


@pytest.mark.parametrize('target', ENGINES)
@pytest.mark.parametrize('bits', [2, 4, 7, 16])
def test_engines_have_activations_of_eight_bits(target, bits):
    assert refused(dict(target=target, activation=dict(bits=bits))).given == bits
    Recipe.from_dict(dict(target='simulation', activation=dict(bits=bits)))


def test_four_bits_are_for_weights_of_matrix_products_alone_in_tensorrt():
    layers = {family: LayerFacts(f'{family}.0', family, True) for family in FAMILIES}
    alone = dict(weight=dict(bits=4), activation=None)
    Recipe.from_dict(alone).check([layers['linear']])
    for family in ('convolution', 'sparse'):
        error = refused(alone, layers=[layers[family]])
        assert error.path == 'recipe.weight.bits' and f"'{family}.0'" in str(error)
    # With inputs in INT8 the weights of linear layers have eight bits too.
    assert 'INT8 inputs' in str(refused(dict(weight=dict(bits=4)), layers=[layers['linear']]))


def test_the_entry_that_decides_a_layer_is_named():
    overrides = [dict(layers='a*', weight=dict(bits=4)), dict(layers='ab', weight=dict(calibrator='mse'))]
    error = refused(dict(overrides=overrides), layers=[LayerFacts('ab', 'convolution', True)])
    assert error.path == 'recipe.overrides[0].weight.bits'
    # Layers that stay float have no widths.
    skipped = dict(overrides=overrides, skip=['ab'])
    Recipe.from_dict(skipped).check([LayerFacts(n, 'convolution', True) for n in ('ab', 'b')][:1])


@pytest.mark.parametrize('target', [*ENGINES, 'simulation'])
def test_auto_is_unsigned_behind_a_relu_where_the_target_has_it(target):
    torch.manual_seed(0)
    model = quantize_(nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1))).eval()
    lifecycle.configure(model, Recipe.from_dict(dict(target=target)))
    lifecycle.calibrate(model, [torch.randn(2, 2, 4, 4)], model)
    assert not model[0].input_quantizer.unsigned
    assert model[2].input_quantizer.unsigned is (target != 'tensorrt')


def test_coverage_says_the_target():
    model = quantize_(nn.Sequential(nn.Conv2d(2, 3, 1)))
    lifecycle.configure(model, Recipe.from_dict(dict(target='onnxruntime')))
    rows = coverage(model)
    assert {row.target for row in rows} == {'onnxruntime'}
    assert coverage_table(rows).endswith("for target 'onnxruntime'")


def test_an_unknown_target_is_refused_with_the_nearest():
    assert "did you mean 'tensorrt'" in str(refused(dict(target='tensor_rt')))
    assert all(repr(name) in str(refused(dict(target=8))) for name in TARGETS)
