"""One quantizer: what it does in each mode, what it remembers, and what a state dict carries."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from pytorch_quantization.nn import TensorQuantizer
from torch import nn

from q3d_plugin import numerics
from q3d_plugin.errors import Q3DError
from q3d_plugin.quantizer import Mode, Quantizer, Role, Stage, largest_magnitude
from q3d_plugin.recipe import ActivationSpec, WeightSpec


def activation(amax=1.5, unsigned=False, owners=('a',), **fields):
    """A calibrated quantizer of an activation."""
    quantizer = Quantizer(ActivationSpec(**fields), name='a.input_quantizer')
    quantizer.owners += owners
    quantizer.set_range(torch.tensor(amax), unsigned)
    return quantizer


@pytest.fixture
def calls(monkeypatch):
    """The tensors that were really quantized."""
    seen, plain = [], numerics.fake_quantize

    def counting(x, *args, **kwargs):
        seen.append(x.shape)
        return plain(x, *args, **kwargs)

    monkeypatch.setattr(numerics, 'fake_quantize', counting)
    return seen


def test_tools_that_look_for_tensor_quantizers_find_it():
    assert isinstance(Quantizer(ActivationSpec()), TensorQuantizer)
    assert isinstance(Quantizer(WeightSpec(), 4, 0), TensorQuantizer)


def test_without_a_range_a_forward_is_an_error_that_names_the_layer(monkeypatch):
    quantizer = Quantizer(ActivationSpec(), name='neck.0.input_quantizer')
    assert quantizer.mode is Mode.UNCALIBRATED
    monkeypatch.setattr('q3d_plugin.quantizer.ADVICE', ['Add a hook'])
    words = r'neck\.0\.input_quantizer has no range.*Add a hook; or load a quantized checkpoint'
    with pytest.raises(Q3DError, match=words):
        quantizer(torch.ones(3))


@pytest.mark.parametrize('bits', [2, 4, 8, 16])
@pytest.mark.parametrize('unsigned', [False, True])
def test_it_quantizes_as_torchs_kernel_does(bits, unsigned):
    quantizer = activation(2.0, unsigned, bits=bits)
    assert quantizer.mode is (Mode.UNSIGNED if unsigned else Mode.SIGNED)
    low, high = numerics.bounds(bits, unsigned)
    x = torch.randn(500)
    zero = torch.zeros((), dtype=torch.int32)
    expected = torch.fake_quantize_per_tensor_affine(x, torch.tensor(2.0) / high, zero, low, high)
    assert torch.equal(quantizer(x), expected)


def test_a_weight_has_a_range_for_each_channel_of_its_axis():
    quantizer = Quantizer(WeightSpec(bits=4), channels=3, axis=1)
    assert quantizer.per_channel
    amax = torch.tensor([0.5, 1.0, 2.0])
    quantizer.set_range(amax)
    x = torch.randn(5, 3, 2)
    out = quantizer(x)
    for c in range(3):
        expected = torch.fake_quantize_per_tensor_affine(x[:, c], float(amax[c] / 7), 0, -8, 7)
        assert torch.allclose(out[:, c], expected)


def test_observing_lets_the_input_through_and_counts_it():
    quantizer = activation(0.1)
    quantizer.observe()
    x = torch.randn(1000)
    assert quantizer(x) is x
    assert quantizer.observer.amax == float(x.abs().max())
    assert quantizer.observer.frames == 1 and quantizer.finite
    quantizer.set_range(torch.tensor(1.0))
    assert not quantizer.observing
    assert not torch.equal(quantizer(x), x)


def test_nan_is_remembered_whatever_comes_after():
    quantizer = Quantizer(ActivationSpec())
    quantizer.observe()
    quantizer(torch.tensor([1.0, float('nan')]))
    quantizer(torch.ones(2))
    assert not quantizer.finite
    quantizer.observe()
    assert quantizer.finite and quantizer.observer.frames == 0


def test_left_float_and_disabled_let_the_input_through():
    x = torch.randn(50)
    quantizer = activation(0.5, bits=2)
    quantized = quantizer(x)
    assert not torch.equal(quantized, x)
    quantizer.disable()
    assert quantizer(x) is x
    quantizer.enable()
    assert torch.equal(quantizer(x), quantized)
    quantizer.leave_float()
    assert quantizer.mode is Mode.FLOAT
    assert quantizer(x) is x


def test_a_disabled_quantizer_takes_no_statistics():
    quantizer = Quantizer(ActivationSpec())
    quantizer.observe()
    quantizer.disable()
    quantizer(torch.ones(3))
    assert quantizer.observer.frames == 0


def test_an_empty_input_comes_back_whether_calibrated_or_not():
    empty = torch.zeros(0, 16)
    assert Quantizer(ActivationSpec())(empty) is empty
    assert activation()(empty) is empty


def test_layers_that_share_it_quantize_one_tensor_once(calls):
    quantizer = activation(owners=('a', 'b', 'c'))
    x, y = torch.randn(20), torch.randn(20)
    first = quantizer(x)
    assert quantizer(x) is first and quantizer(x) is first
    assert len(calls) == 1
    # Equal values are not enough, it has to be the same tensor.
    assert torch.equal(quantizer(x.clone()), first)
    quantizer(y)
    assert len(calls) == 3
    assert torch.equal(quantizer(x), first)


def test_shared_statistics_count_one_tensor_once():
    quantizer = Quantizer(ActivationSpec())
    quantizer.owners += ['a', 'b']
    quantizer.observe()
    x = torch.rand(100)
    quantizer(x)
    quantizer(x)
    assert quantizer.observer.frames == 1 and quantizer.observer.counts.sum() == 100
    quantizer(x.clone())
    assert quantizer.observer.frames == 2


def test_a_quantizer_of_one_layer_remembers_nothing(calls):
    quantizer = activation(owners=('a',))
    x = torch.randn(20)
    assert torch.equal(quantizer(x), quantizer(x))
    assert len(calls) == 2 and quantizer._memo.value_of(x) is None


def test_a_change_in_place_is_noticed():
    quantizer = activation(3.0, owners=('a', 'b'))
    x = torch.randn(20)
    quantizer(x)
    x.mul_(0.3)
    fresh = activation(3.0)
    assert torch.equal(quantizer(x), fresh(x))
    x.relu_()
    assert torch.equal(quantizer(x), fresh(x))


def test_a_new_range_is_noticed():
    quantizer = activation(3.0, owners=('a', 'b'))
    x = torch.randn(20)
    quantizer(x)
    quantizer.set_range(torch.tensor(0.25))
    assert torch.equal(quantizer(x), activation(0.25)(x))
    source = activation(1.0)
    quantizer.load_state_dict(source.state_dict())
    assert torch.equal(quantizer(x), source(x))
    quantizer.leave_float()
    assert quantizer(x) is x


def test_a_result_without_gradient_is_not_given_to_who_wants_one():
    quantizer = activation(3.0, owners=('a', 'b'))
    x = torch.randn(20, requires_grad=True)
    with torch.no_grad():
        assert not quantizer(x).requires_grad
    out = quantizer(x)
    assert out.requires_grad
    out.sum().backward()
    assert x.grad is not None and x.grad.any()
    with torch.no_grad():
        assert not quantizer(x).requires_grad


@pytest.mark.parametrize('observing', [False, True])
def test_the_memo_keeps_no_tensor_alive(observing):
    quantizer = activation(owners=('a', 'b'))
    if observing:
        quantizer.observe()
    x = torch.randn(20) + 1
    out = quantizer(x)
    dead_x, dead_out = weakref.ref(x), weakref.ref(out)
    del x, out
    gc.collect()
    assert dead_x() is None and dead_out() is None
    assert quantizer._memo._reference is None


def test_the_memo_keeps_no_intermediate_result_of_a_training_step_alive():
    quantizer = activation(owners=('a', 'b'))
    weight = torch.randn(20, requires_grad=True)
    x = weight * 2
    out = quantizer(x)
    (out + quantizer(x)).sum().backward()
    dead_x, dead_out = weakref.ref(x), weakref.ref(out)
    del x, out
    gc.collect()
    assert dead_x() is None and dead_out() is None


def test_the_death_of_an_old_input_does_not_forget_the_new_one(calls):
    quantizer = activation(owners=('a', 'b'))
    old, new = torch.randn(20), torch.randn(20)
    quantizer(old)
    first = quantizer(new)
    del old
    gc.collect()
    assert quantizer(new) is first
    assert len(calls) == 2


def test_inference_mode_works():
    quantizer = activation(owners=('a', 'b'))
    with torch.inference_mode():
        x = torch.randn(20)
        assert torch.equal(quantizer(x), quantizer(x))


@pytest.mark.parametrize('unsigned', [False, True])
@pytest.mark.parametrize('bits', [4, 8, 16])
def test_a_state_dict_restores_mode_bits_and_signedness(unsigned, bits):
    source = activation(0.7, unsigned, bits=bits)
    target = Quantizer(ActivationSpec(bits=9))
    result = target.load_state_dict(source.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert target.mode is source.mode and target.num_bits == bits
    x = torch.randn(300)
    assert torch.equal(target(x), source(x))
    assert {k: v.tolist() for k, v in target.state_dict().items()} == {
        k: v.tolist() for k, v in source.state_dict().items()
    }


def test_a_state_dict_restores_what_was_left_float_or_never_calibrated():
    source = activation()
    source.leave_float()
    target = activation()
    target.load_state_dict(source.state_dict())
    x = torch.randn(9)
    assert target.mode is Mode.FLOAT and target(x) is x
    target.load_state_dict(Quantizer(ActivationSpec()).state_dict())
    with pytest.raises(Q3DError):
        target(x)


def test_a_weights_ranges_travel_in_a_state_dict():
    source = Quantizer(WeightSpec(bits=4), 3, 0)
    source.set_range(torch.tensor([1.0, 2.0, 3.0]))
    target = Quantizer(WeightSpec(bits=4), 3, 0)
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(target(x), source(x))


def test_a_float_state_dict_leaves_it_alone_and_nothing_is_missing(caplog):
    model = torch.nn.ModuleDict(dict(layer=torch.nn.Linear(2, 2), quantizer=activation(0.7)))
    state = {k: v for k, v in model.state_dict().items() if k.startswith('layer.')}
    result = model.load_state_dict(state, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert model['quantizer'].mode is Mode.SIGNED and model['quantizer']._amax == torch.tensor(0.7)
    assert not caplog.records


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
@pytest.mark.parametrize('grad', [False, True])
def test_copies_work_and_are_independent(copied, grad):
    quantizer = activation(2.0, owners=('a', 'b'))
    weight = torch.randn(20, requires_grad=grad)
    x = weight * 1
    expected = quantizer(x)
    twin = copied(quantizer)
    assert torch.equal(twin(x), expected)
    twin.set_range(torch.tensor(0.5))
    assert quantizer._amax == 2
    assert twin.owners == ['a', 'b'] and twin.spec == quantizer.spec


def test_repr_says_what_it_does():
    assert 'uncalibrated 8 bits' in repr(Quantizer(ActivationSpec()))
    assert 'unsigned 4 bits amax=0.75' in repr(activation(0.75, True, bits=4))
    weight = Quantizer(WeightSpec(), 2, 0)
    weight.set_range(torch.ones(2))
    assert 'signed 8 bits per channel' in repr(weight)


@pytest.mark.parametrize('unsigned', [False, True])
@pytest.mark.parametrize('bits', [4, 8])
def test_a_dynamic_range_is_that_of_the_current_tensor(unsigned, bits):
    quantizer = activation(0.1, unsigned, owners=('a', 'b'), range='dynamic', bits=bits)
    assert quantizer.dynamic and quantizer.unsigned is unsigned
    for size in (0.01, 1.0, 300.0):
        x = (torch.rand(40) if unsigned else torch.randn(40)) * size
        expected = numerics.fake_quantize(x, x.abs().max(), bits, unsigned)
        assert torch.equal(quantizer(x), expected) and torch.equal(quantizer(x), expected)
        largest = x.abs().max()
        assert (quantizer(x) - x).abs().max() <= largest / numerics.bounds(bits, unsigned)[1] * 0.5001
    assert not quantizer(torch.zeros(3)).any()
    other = Quantizer(ActivationSpec(bits=bits), name='other')
    other.load_state_dict(quantizer.state_dict())
    assert other.dynamic and torch.equal(other(x), expected)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_the_largest_magnitude_of_several_tensors_in_every_precision(dtype):
    tensors = [torch.tensor(v, dtype=dtype) for v in ([-3.0, 2.0], [], [1.5])]
    assert torch.equal(largest_magnitude(*tensors), torch.tensor(3.0, dtype=dtype))


def test_a_dynamic_range_lets_gradients_through():
    quantizer = activation(0.1, range='dynamic')
    x = torch.randn(10, requires_grad=True)
    quantizer(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(10))


# What pytorch_quantization's own functions do to a TensorQuantizer, they do to ours.


def test_quantization_switched_off_lets_the_tensor_through_and_on_quantizes_again():
    quantizer, x = activation(1.5), torch.randn(40)
    expected = quantizer(x)
    quantizer.disable_quant()
    assert quantizer(x) is x and quantizer.stage is Stage.OFF
    quantizer.enable_quant()
    assert torch.equal(quantizer(x), expected) and quantizer.stage is Stage.STATIC
    quantizer.disable()
    assert quantizer(x) is x and quantizer.stage is Stage.OFF
    quantizer.enable()
    assert torch.equal(quantizer(x), expected)


@pytest.mark.parametrize('value', [0.75, torch.tensor(0.75)])
def test_a_range_that_is_set_is_used_and_saved(value):
    quantizer = Quantizer(ActivationSpec())
    assert quantizer.amax is None
    quantizer.amax = value
    x = torch.randn(40)
    assert quantizer.amax == 0.75 and quantizer.stage is Stage.STATIC
    assert torch.equal(quantizer(x), activation(0.75)(x))
    again = Quantizer(ActivationSpec())
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again(x), quantizer(x))
    with pytest.raises(TypeError, match='2 numbers were given, it has 1'):
        quantizer.amax = [1.0, 2.0]


def test_ranges_of_a_weight_can_be_set_with_the_axes_that_pytorch_quantization_keeps():
    quantizer, weight = Quantizer(WeightSpec(), 3, 0), torch.randn(3, 2, 1, 1)
    quantizer.amax = weight.abs().amax((1, 2, 3), keepdim=True)
    reference = Quantizer(WeightSpec(), 3, 0)
    reference.set_range(weight.abs().amax((1, 2, 3)))
    assert torch.equal(quantizer(weight), reference(weight))


def test_bits_that_are_set_are_used_by_quantization_calibration_and_checkpoints():
    quantizer, x = activation(2.0), torch.linspace(-2, 2, 50)
    quantizer.num_bits = 4
    assert len(quantizer(x).unique()) == 15 and quantizer.spec.bits == 4
    again = activation(1.0)
    again.load_state_dict(quantizer.state_dict())
    assert again.num_bits == 4 and torch.equal(again(x), quantizer(x))


def test_signedness_that_is_set_is_used_and_saved():
    quantizer, x = activation(2.0), torch.rand(50) * 2
    quantizer.unsigned = True
    assert torch.equal(quantizer(x), activation(2.0, unsigned=True)(x))
    again = activation(1.0)
    again.load_state_dict(quantizer.state_dict())
    assert again.unsigned
    with pytest.raises(Q3DError, match='narrow_range: True was given'):
        quantizer.narrow_range = True


def test_the_step_size_of_pytorch_quantization_is_ours():
    assert activation(2.54).step_size.item() == pytest.approx(0.02)
    assert activation(2.55, unsigned=True).step_size.item() == pytest.approx(0.01)


@pytest.mark.parametrize('unsigned', [False, True])
def test_native_fake_quantization_for_an_export_gives_the_same_values(monkeypatch, unsigned):
    x = torch.randn(3, 40) if not unsigned else torch.rand(3, 40)
    weight, amax = torch.randn(3, 40), torch.tensor([1.0, 2.0, 0.5])
    quantizer, of_weight = activation(0.8, unsigned=unsigned), Quantizer(WeightSpec(), 3, 0)
    of_weight.set_range(amax)
    expected = quantizer(x), of_weight(weight)
    calls = []
    for name in ('fake_quantize_per_tensor_affine', 'fake_quantize_per_channel_affine'):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    monkeypatch.setattr(TensorQuantizer, 'use_fb_fake_quant', True)
    with torch.no_grad():
        assert torch.allclose(quantizer(x), expected[0], atol=1e-6)
        assert torch.allclose(of_weight(weight), expected[1], atol=1e-6)
    assert calls == ['fake_quantize_per_tensor_affine', 'fake_quantize_per_channel_affine']


def test_an_export_has_quantize_and_dequantize_nodes(monkeypatch, tmp_path):
    onnx = pytest.importorskip('onnx')
    from q3d_plugin import lifecycle
    from q3d_plugin.recipe import Recipe
    from q3d_plugin.transforms.insert import quantize_

    model = quantize_(nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1))).eval()
    lifecycle.configure(model, Recipe())
    x = torch.randn(1, 2, 4, 4)
    lifecycle.calibrate(model, [x], model)
    monkeypatch.setattr(TensorQuantizer, 'use_fb_fake_quant', True)
    path = str(tmp_path / 'model.onnx')
    torch.onnx.export(model, (x,), path, opset_version=13, dynamo=False)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count('QuantizeLinear') == operators.count('DequantizeLinear') == 4


def test_the_stage_is_said_in_one_place():
    quantizer = Quantizer(ActivationSpec(range='dynamic'))
    assert quantizer.role is Role.ACTIVATION and quantizer.stage is Stage.UNCALIBRATED
    quantizer.observe()
    assert quantizer.stage is Stage.OBSERVING
    quantizer.set_range(torch.tensor(1.0))
    assert quantizer.stage is Stage.DYNAMIC and not quantizer.has_range
    quantizer.leave_float()
    assert quantizer.stage is Stage.FLOAT
    assert Quantizer(WeightSpec(), 4, 0).role is Role.WEIGHT
    assert 'activation float 8 bits' in repr(quantizer)


def test_what_was_quantized_in_place_is_given_to_the_next_reader():
    quantizer = activation(1.0, owners=('a', 'b'))
    x = torch.randn(20)
    with torch.no_grad():
        expected = activation(1.0)(x)
        assert quantizer(x, inplace=True) is x and torch.equal(x, expected)
        assert quantizer(x, inplace=True) is x and torch.equal(x, expected)


def test_configuring_anew_keeps_the_object_and_forgets_the_rest():
    quantizer = activation(1.0, owners=('a', 'b'))
    quantizer.disable()
    quantizer.configure(ActivationSpec(bits=6), 'name')
    assert quantizer.enabled and quantizer.stage is Stage.UNCALIBRATED and quantizer.owners == []
    assert quantizer.num_bits == 6 and quantizer._state.tolist() == [0, 6]


def test_a_range_that_changes_in_place_is_read_again_for_what_lies_on_a_grid():
    concatenated, first, second = activation(1.0), activation(1.0), activation(1.0)
    with torch.no_grad():
        x = concatenated(torch.randn(20), inplace=True)
        assert first(x) is x
        second(x)
        second._amax.copy_(torch.tensor(0.5))
        assert torch.equal(second(x), activation(0.5)(x))


def test_the_largest_magnitude_of_nothing_is_on_the_device_of_its_input():
    assert largest_magnitude(torch.zeros(0, 3, device='meta')).device.type == 'meta'
