"""The histogram of magnitudes against NumPy's over all data at once."""

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from q3d_plugin.observer import MagnitudeHistogram


def observed(frames, bins=4096):
    histogram = MagnitudeHistogram(bins)
    for frame in frames:
        assert histogram.update(frame)
    return histogram


def content(histogram):
    return (
        histogram.exponent,
        histogram.minimum,
        histogram.maximum,
        histogram.frames,
        histogram.counts.tolist(),
    )


def frames_of_many_sizes():
    """Frames each of which makes the histogram grow, or not, depending on the order."""
    return [
        torch.randn(300),
        torch.randn(4, 50) * 100,
        torch.rand(200) * 1e-3,
        torch.zeros(10),
        -torch.rand(7, 7) * 3000,
        torch.tensor([2.0, 4.0, 1024.0]),
    ]


def test_counts_are_numpys_over_all_frames():
    frames = frames_of_many_sizes()
    histogram = observed(frames)
    everything = torch.cat([f.flatten() for f in frames]).numpy()
    magnitudes = np.abs(everything)
    assert histogram.top == 2.0 ** math.frexp(float(magnitudes.max()))[1]
    expected = np.histogram(magnitudes, bins=4096, range=(0, histogram.top))[0]
    assert histogram.counts.tolist() == expected.tolist()
    assert histogram.minimum == everything.min() and histogram.maximum == everything.max()
    assert histogram.amax == magnitudes.max()
    assert histogram.frames == len(frames)


def test_the_order_of_frames_does_not_matter():
    frames = frames_of_many_sizes()
    expected = content(observed(frames))
    for order in itertools.islice(itertools.permutations(frames), 0, 720, 37):
        assert content(observed(order)) == expected


MAGNITUDES = st.floats(-(2.0**99), 2.0**99, width=32) | st.sampled_from(
    [0.0, 1e-40, -1e-38, 0.5, 1.0, 2.0**100]
)
FRAMES = st.lists(st.lists(MAGNITUDES, min_size=1, max_size=6), min_size=1, max_size=6)


@given(FRAMES, st.randoms(use_true_random=False), st.integers(0, 6))
@settings(max_examples=150, deadline=None)
def test_order_and_split_over_ranks_do_not_matter_for_any_values(values, random, split):
    frames = [torch.tensor(v) for v in values]
    expected = content(observed(frames, bins=64))
    shuffled = random.sample(frames, len(frames))
    assert content(observed(shuffled, bins=64)) == expected
    merged = observed(frames[:split], bins=64)
    merged.merge(observed(frames[split:], bins=64))
    if merged.counts is not None:
        assert content(merged) == expected
    other_way = observed(frames[split:], bins=64)
    other_way.merge(observed(frames[:split], bins=64))
    assert content(other_way) == expected if other_way.counts is not None else not frames


def test_merging_equals_seeing_everything_at_once():
    frames = frames_of_many_sizes()
    expected = content(observed(frames))
    for split in range(len(frames) + 1):
        merged = observed(frames[:split])
        right = observed(frames[split:])
        before = right.state()[2:]
        merged.merge(right)
        assert content(merged) == expected
        assert right.state()[2:] == before


def test_a_merged_histogram_does_not_share_counts_with_its_source():
    source, target = observed([torch.rand(9)]), MagnitudeHistogram()
    target.merge(source)
    target.update(torch.rand(9))
    assert source.counts.sum() == 9 and target.counts.sum() == 18


def test_it_grows_without_losing_a_value():
    histogram = observed([torch.rand(100)], bins=16)
    tops = [histogram.top]
    for power in (3, 4, 9, 60):
        histogram.update(torch.tensor([2.0**power]))
        tops.append(histogram.top)
    assert tops == [1.0, 16.0, 32.0, 1024.0, 2.0**61]
    assert histogram.counts.sum() == 104
    # 100 numbers and 8, 16 and 512 are all in the lowest of 16 bins of [0, 2**61].
    assert histogram.counts[0] == 103 and histogram.counts[8] == 1


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_nan_and_inf_are_reported_and_change_nothing(bad):
    histogram = observed([torch.randn(50)])
    before = content(histogram)
    x = torch.randn(50)
    x[17] = bad
    assert histogram.update(x) is False
    assert content(histogram) == before
    assert MagnitudeHistogram().update(torch.tensor([bad])) is False


def test_an_empty_tensor_is_no_data():
    histogram = MagnitudeHistogram()
    assert histogram.update(torch.zeros(0, 5)) is True
    assert histogram.frames == 0 and histogram.amax == 0 and histogram.counts is None
    histogram.update(torch.ones(3))
    before = content(histogram)
    histogram.update(torch.zeros(0))
    assert content(histogram) == before


def test_zeros_are_data_of_magnitude_zero():
    histogram = observed([torch.zeros(30), torch.zeros(5)])
    assert histogram.amax == 0 and histogram.frames == 2 and histogram.counts[0] == 35
    histogram.update(torch.tensor([3.0]))
    assert histogram.amax == 3 and histogram.counts.sum() == 36 and histogram.counts[0] == 35


@pytest.mark.parametrize('value', [1e-45, 1e-40, 1.2e-38, 1e-20, 1e20, 1e37])
def test_denormal_and_huge_values_are_counted(value):
    histogram = observed([torch.tensor([value, -value, 0.0])])
    assert histogram.counts.sum() == 3
    assert histogram.amax == float(torch.tensor(value)) > 0
    assert histogram.amax < histogram.top < math.inf


@pytest.mark.parametrize('value', [1e38, 3.4e38])
def test_the_largest_of_all_values_keep_their_magnitude(value):
    histogram = observed([torch.tensor([value, 1.0])])
    assert histogram.amax == float(torch.tensor(value))
    assert histogram.counts[0] == 1


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types(dtype):
    x = (torch.randn(500) * 3).to(dtype)
    assert content(observed([x])) == content(observed([x.float()]))


def test_gradients_and_layout_of_the_input_play_no_part():
    x = torch.randn(8, 6, 5, requires_grad=True)
    histogram = observed([x.transpose(0, 2)])
    assert content(histogram) == content(observed([x.detach()]))
    assert not histogram.counts.requires_grad


def test_large_tensors_are_counted_whole_in_pieces():
    x = torch.rand(2, 2**20 + 11)
    x[0, 5], x[1, 7] = -4.0, 9.0
    histogram = observed([x])
    assert (histogram.minimum, histogram.maximum) == (-4.0, 9.0)
    expected = np.histogram(x.abs().numpy(), 4096, (0, histogram.top))[0]
    assert np.array_equal(histogram.counts.numpy(), expected)
    assert histogram.kept is None


def test_state_survives_the_trip_to_another_process():
    histogram = observed(frames_of_many_sizes())
    again = MagnitudeHistogram.from_state(pickle.loads(pickle.dumps(histogram.state())))
    assert content(again) == content(histogram) and again.bins == histogram.bins
    x = torch.randn(20) * 1e5
    histogram.update(x)
    again.update(x)
    assert content(again) == content(histogram)


def test_state_of_an_empty_histogram():
    again = MagnitudeHistogram.from_state(MagnitudeHistogram(32).state())
    assert again.frames == 0 and again.bins == 32
    again.merge(observed([torch.rand(5)], bins=32))
    assert again.counts.sum() == 5


def test_kept_values_are_all_values_until_there_are_too_many():
    histogram = MagnitudeHistogram()
    frames = [torch.randn(1000) for _ in range(3)]
    for frame in frames:
        histogram.update(frame)
    assert torch.equal(histogram.kept, torch.cat(frames))
    histogram.update(torch.randn(2**16))
    assert histogram.kept is None
    histogram.update(frames[0])
    assert histogram.kept is None


def test_sums_are_those_of_the_magnitudes_and_merge():
    left, right = MagnitudeHistogram(64), MagnitudeHistogram(64)
    frames = [torch.randn(5000), torch.randn(3000) * 40]
    left.update(frames[0])
    right.update(frames[1])
    left.merge(right)
    values = torch.cat(frames).abs().double().numpy()
    expected = np.histogram(values, 64, (0, left.top), weights=values)[0]
    np.testing.assert_allclose(left.sums.numpy(), expected, rtol=1e-9)


def test_values_that_are_kept_stay_on_their_device():
    histogram = MagnitudeHistogram()
    for _ in range(2):
        histogram._keep(torch.ones(3, device='meta'))
    assert histogram.kept.device.type == 'meta' and histogram.kept.shape == (6,)
