"""spconv's own algorithms on CUDA with quantized features and weights, against its CPU build."""

import pytest
import torch
from gpu_toys import sparse_frame, sparse_net
from torch.testing import assert_close

from q3d_plugin import lifecycle
from q3d_plugin.cpu import enable_cpu_mode

pytest.importorskip('spconv.pytorch')

enable_cpu_mode()


def algorithms():
    """spconv's algorithms by name; None: its own choice."""
    try:
        from spconv.core import ConvAlgo
    except ImportError:
        return {'default': None}
    return {'default': None, 'native': ConvAlgo.Native, 'implicit_gemm': ConvAlgo.MaskImplicitGemm}


def dense(x):
    """Features at their places: rows of two algorithms may come in another order."""
    return x.dense().detach().cpu()


def calibrated_state():
    """Weights and ranges, made on the CPU."""
    model = sparse_net()
    lifecycle.calibrate(model, [0], lambda _: model(sparse_frame()))
    return model


@pytest.mark.parametrize('algorithm', algorithms())
@pytest.mark.parametrize('gradients', [False, True])
def test_an_algorithm_computes_what_the_cpu_computes(device, algorithm, gradients):
    if device.type == 'cpu' and algorithm == 'implicit_gemm':
        pytest.skip('the CPU build of spconv has the native algorithm alone')
    reference = calibrated_state()
    model = sparse_net(device, algorithms()[algorithm])
    model.load_state_dict(reference.state_dict())
    with torch.no_grad():
        expected = dense(reference(sparse_frame()))
    with torch.set_grad_enabled(gradients):
        found = dense(model(sparse_frame(device)))
    assert expected.abs().max() > 0.1
    # A value that lies on a tie may fall on the other side.
    assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    assert (found - expected).abs().mean() < 5e-3 * expected.abs().mean()


def test_the_float_weights_are_kept_and_get_gradients(device):
    model = sparse_net(device)
    model.load_state_dict(calibrated_state().state_dict())
    before = [p.detach().clone() for p in model.parameters()]
    model.train()
    dense_out = model(sparse_frame(device)).features
    dense_out.square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad.abs().sum() > 0 for p in model.parameters())


def test_calibration_is_that_of_the_cpu(device):
    here, there = calibrated_state(), sparse_net(device)
    lifecycle.calibrate(there, [0], lambda _: there(sparse_frame(device)))
    for a, b in zip(lifecycle.quantizers(here), lifecycle.quantizers(there)):
        assert a.mode == b.mode
        assert_close(a.amax, b.amax.cpu(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.float16])
def test_half_precision_computes_nearly_the_same(cuda, dtype):
    model = sparse_net(cuda)
    model.load_state_dict(calibrated_state().state_dict())
    with torch.no_grad():
        expected = dense(model(sparse_frame(cuda)))
        half = sparse_frame(cuda)
        with torch.autocast('cuda', dtype=dtype):
            found = dense(model(half.replace_feature(half.features.to(dtype)))).float()
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()
