"""The number and size of camera images, as calibration saw them."""

import pytest
import torch

from q3d_plugin.camera_input import CameraInput
from q3d_plugin.errors import Q3DError
from q3d_plugin.quantizer import Quantizer
from q3d_plugin.recipe import ActivationSpec, WeightSpec


def images(views=6, height=8, width=16):
    return torch.zeros(1, views, 3, height, width)


def test_what_calibration_saw_first_holds():
    camera, quantizers = CameraInput('load them'), [Quantizer(ActivationSpec()) for _ in range(2)]
    camera.check(images(5), quantizers)  # nothing is calibrated: nothing to compare with
    for quantizer in quantizers:
        quantizer.observe()
    camera.check(images(6), quantizers)
    quantizers[0](torch.ones(2))
    with pytest.raises(Q3DError, match='7 of 8 x 16 .* calibrated with 6 of 8 x 16'):
        camera.check(images(7), quantizers)
    for quantizer in quantizers:
        quantizer.set_range(torch.tensor(1.0))
    camera.check(images(6), quantizers)
    for other in (images(5), images(6, 16), images(6, 8, 8)):
        with pytest.raises(Q3DError, match='calibrated with 6 of 8 x 16'):
            camera.check(other, quantizers)
    quantizers[0].disable()
    quantizers[1].leave_float()
    camera.check(images(5), quantizers)


def test_ranges_of_weights_and_of_each_tensor_hold_for_any_images():
    camera = CameraInput('load them')
    weight, dynamic = Quantizer(WeightSpec(), 3, 0), Quantizer(ActivationSpec(range='dynamic'))
    for quantizer in (weight, dynamic):
        quantizer.observe()
    camera.check(images(6), [weight, dynamic])
    for quantizer in (weight, dynamic):
        quantizer.set_range(torch.ones_like(quantizer._amax))
    camera.check(images(5), [weight, dynamic])


def test_float_checkpoints_have_none_and_quantized_ones_theirs():
    camera, other = CameraInput(''), CameraInput('')
    quantizer = Quantizer(ActivationSpec())
    quantizer.observe()
    camera.check(images(4), [quantizer])
    other.load_state_dict(camera.state_dict(), strict=True)
    other.load_state_dict({}, strict=True)
    quantizer.set_range(torch.tensor(1.0))
    other.check(images(4), [quantizer])
    with pytest.raises(Q3DError, match='calibrated with 4'):
        other.check(images(3), [quantizer])
