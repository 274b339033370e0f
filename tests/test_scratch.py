"""Memory that is used again: by nobody while somebody holds it, and with the same numbers."""

import threading

import pytest
import torch

from q3d_plugin import numerics, scratch
from q3d_plugin.scratch import BUFFERS, LARGE, scratch_like

pytestmark = pytest.mark.skipif(
    not hasattr(torch._C, '_storage_Use_Count'), reason='this torch does not tell who holds memory'
)


@pytest.fixture(autouse=True)
def _without_buffers(monkeypatch):
    monkeypatch.setattr(scratch, '_kept', scratch._Kept())


def place(tensor):
    return tensor.untyped_storage().data_ptr()


def test_memory_is_used_again_once_nobody_holds_it():
    x = torch.randn(2, LARGE)
    first = scratch_like(x)
    where, view = place(first), first[1, 5:]
    first.fill_(1.0)
    del first
    second = scratch_like(x)
    second.fill_(2.0)
    assert place(second) != where and (view == 1).all()  # the view holds the first one
    assert scratch_like(x) is None  # there are no more than two
    del view
    assert place(scratch_like(x)) == where


def test_shapes_strides_and_types_are_those_of_the_tensor():
    for x in (
        torch.randn(3, 4, 300, 300),
        torch.randn(3, 4, 300, 300).contiguous(memory_format=torch.channels_last),
        torch.randn(600, 700, dtype=torch.float64),
    ):
        made = scratch_like(x)
        assert made.shape == x.shape and made.stride() == x.stride() and made.dtype == x.dtype
        del made
    assert scratch_like(torch.randn(LARGE - 1)) is None
    with torch.inference_mode():
        assert scratch_like(torch.randn(LARGE)) is None
    assert scratch_like(torch.nn.Parameter(torch.randn(LARGE))) is None
    assert scratch_like(torch.randn(LARGE, device='meta')) is None
    assert len(scratch._kept.buffers) <= BUFFERS


def test_what_a_thread_keeps_is_bounded_and_its_own():
    for _ in range(3):
        sizes = [LARGE, 8 * LARGE, 3 * LARGE, 20 * LARGE]
        held = [scratch_like(torch.empty(n)) for n in sizes]
        assert sum(h is not None for h in held) <= BUFFERS
        del held
    assert sum(b.numel() * 4 for b, _ in scratch._kept.buffers) <= scratch.BYTES
    assert scratch_like(torch.empty(scratch.BYTES // 4 + 1)) is None
    seen, mine = [], {b.data_ptr() for b, _ in scratch._kept.buffers}
    thread = threading.Thread(target=lambda: seen.append(scratch_like(torch.empty(LARGE))))
    thread.start()
    thread.join()
    assert place(seen[0]) not in mine


@pytest.mark.parametrize('unsigned', [False, True])
@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_large_tensors_are_quantized_as_small_ones(unsigned, inplace, layout):
    x = (torch.randn(4, 8, 130, 131) * 3).contiguous(memory_format=layout)
    x[0, 0, 0, 0], x[1, 2, 3, 4] = float('nan'), float('inf')
    amax = torch.tensor(4.0)
    rows = [numerics.fake_quantize(row, amax, 8, unsigned) for row in x]
    assert x[0].numel() < LARGE < x.numel()
    made = numerics.fake_quantize(
        x.clone(memory_format=torch.preserve_format), amax, 8, unsigned, None, inplace
    )
    assert torch.equal(made.nan_to_num(nan=77.0), torch.stack(rows).nan_to_num(nan=77.0))
    assert made.stride() == x.stride()


def test_a_slice_that_is_not_dense_is_quantized_all_the_same():
    x = torch.randn(4, 2 * LARGE)[:, ::2]
    expected = (x * 2).round().clamp(-128, 127) / 2
    assert torch.equal(numerics.fake_quantize(x, torch.tensor(63.5), 8), expected)


def test_a_trace_does_not_write_into_kept_memory():
    amax = torch.tensor(127.0)
    traced = torch.jit.trace(lambda x: numerics.fake_quantize(x, amax, 8), torch.randn(LARGE))
    first, second = (traced(torch.full((LARGE,), v)) for v in (1.0, 2.0))
    assert (first == 1).all() and (second == 2).all()


def test_results_that_are_held_stay_what_they_are():
    values = [
        numerics.fake_quantize(torch.full((LARGE,), float(i)), torch.tensor(127.0), 8) for i in range(5)
    ]
    assert [v[0].item() for v in values] == [0, 1, 2, 3, 4]
    assert all((v == i).all() for i, v in enumerate(values))


def test_what_a_graph_of_autograd_saved_is_not_written_into():
    weight = torch.ones(LARGE, requires_grad=True)
    quantized = numerics.fake_quantize(torch.full((LARGE,), 3.0), torch.tensor(127.0), 8)
    loss = (quantized * weight).sum()
    del quantized
    for _ in range(4):
        numerics.fake_quantize(torch.zeros(LARGE), torch.tensor(127.0), 8)
    loss.backward()
    assert (weight.grad == 3).all()
