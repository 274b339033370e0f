"""The stand-ins for torchvision's transforms, and batches of camera images with any NumPy."""

import numpy as np
import pytest
import torch

from q3d_plugin.openpcdet.image_transforms import Compose, Normalize, ToTensor


@pytest.mark.parametrize('shape', [(4, 6, 3), (4, 6)])
def test_an_image_of_bytes_becomes_normalized_channels(shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    mean, std = ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]) if len(shape) == 3 else ([0.4], [0.2])
    made = Compose([ToTensor(), Normalize(mean, std)])(image)
    pixels = image.reshape(4, 6, -1)
    assert made.dtype == torch.float32 and made.shape == (len(mean), 4, 6)
    for c in range(len(mean)):
        expected = (pixels[:, :, c] / 255 - mean[c]) / std[c]
        np.testing.assert_allclose(made[c].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_picture_of_pillow_is_an_image_too():
    image = pytest.importorskip('PIL.Image')
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    assert torch.equal(ToTensor()(image.fromarray(pixels)), ToTensor()(pixels))
