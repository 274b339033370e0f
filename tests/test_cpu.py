"""CPU mode: spconv's gaps are mended, against dense convolutions, and nothing is touched where CUDA is."""

import pytest
import torch

from q3d_plugin import cpu

spconv = pytest.importorskip('spconv.pytorch')

from spconv.pytorch import ops  # noqa: E402

needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason='CPU mode is off where CUDA is')


@pytest.fixture(autouse=True)
def cpu_mode():
    if not torch.cuda.is_available():
        assert cpu.enable_cpu_mode() is True


def sparse_input(channels, size=5, batch=2, count=40):
    coordinates = torch.randperm(batch * size**3)[:count].sort().values
    zyx = torch.stack([coordinates // size**3] + [coordinates // size**i % size for i in (2, 1, 0)], dim=1)
    return spconv.SparseConvTensor(torch.randn(count, channels), zyx.int(), [size] * 3, batch)


@needs_cpu
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('bias', [False, True])
def test_a_submanifold_convolution_is_the_dense_one_at_active_voxels(training, bias):
    layer = spconv.SubMConv3d(3, 4, 3, bias=bias).train(training)
    x = sparse_input(3)
    features = x.features.clone().requires_grad_()
    got = layer(x.replace_feature(features))

    dense_features = x.features.clone().requires_grad_()
    weight = layer.weight.detach().permute(0, 4, 1, 2, 3).clone().requires_grad_()
    dense = torch.nn.functional.conv3d(
        x.replace_feature(dense_features).dense(), weight, layer.bias if bias else None, padding=1
    )
    b, z, y, w = x.indices.long().unbind(1)
    expected = dense[b, :, z, y, w]
    assert torch.allclose(got.features, expected, atol=1e-5)

    upstream = torch.randn_like(expected)
    if not (bias and not training):  # spconv's bias has no gradient in eval mode; the quantized layers add it
        got.features.backward(upstream)
        expected.backward(upstream)
        assert torch.allclose(features.grad, dense_features.grad, atol=1e-5)
        assert torch.allclose(layer.weight.grad.permute(0, 4, 1, 2, 3), weight.grad, atol=1e-4)


@needs_cpu
def test_a_strided_convolution_with_bias_is_the_dense_one_where_it_has_voxels():
    layer = spconv.SparseConv3d(2, 3, 3, stride=2, padding=1, bias=True).eval()
    x = sparse_input(2)
    with torch.no_grad():
        got = layer(x)
        weight = layer.weight.permute(0, 4, 1, 2, 3)
        dense = torch.nn.functional.conv3d(x.dense(), weight, layer.bias, stride=2, padding=1)
    b, z, y, w = got.indices.long().unbind(1)
    assert len(b) > 10
    assert torch.allclose(got.features, dense[b, :, z, y, w], atol=1e-5)


@needs_cpu
def test_patches_are_idempotent():
    before = ops.indice_conv, torch.cuda.set_device
    assert cpu.enable_cpu_mode() is True
    assert (ops.indice_conv, torch.cuda.set_device) == before


@needs_cpu
def test_set_device_is_harmless():
    assert torch.cuda.set_device(0) is None


def test_nothing_is_touched_where_cuda_is(monkeypatch):
    def original(device):
        raise AssertionError('not called')

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'set_device', original)
    monkeypatch.setattr(ops, 'indice_conv', original)
    assert cpu.enable_cpu_mode() is False
    cpu.patch_distributed()
    cpu.patch_spconv()
    assert torch.cuda.set_device is original and ops.indice_conv is original


def test_a_sparse_convolution_gives_the_same_on_several_threads_and_in_every_run():
    """spconv's own CPU scatter loses additions with more than one thread."""
    indices = torch.unique(torch.randint(0, 40, (15_000, 3)), dim=0)
    indices = torch.cat([torch.zeros(len(indices), 1, dtype=torch.long), indices], 1).int()
    x = spconv.SparseConvTensor(torch.randn(len(indices), 16), indices, [40, 40, 40], 1)
    convolution = spconv.SubMConv3d(16, 16, 3, bias=False).eval()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with torch.no_grad():
            expected = convolution(x).features
        torch.set_num_threads(4)
        with torch.no_grad():
            for _ in range(5):
                torch.testing.assert_close(convolution(x).features, expected, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(threads)
