"""Fake quantization against torch's kernels and pytorch_quantization; range searches against brute force."""

import math

import numpy as np
import pytest
import torch
from pytorch_quantization import tensor_quant

from q3d_plugin import numerics

BITS = tuple(range(2, 17))


def distributions(count=20000, seed=0):
    """Magnitudes as activations have them, by name."""
    rng = np.random.default_rng(seed)
    half_normal = np.maximum(rng.normal(size=count), 0)
    heavy = np.abs(rng.standard_t(2, size=count))
    outliers = np.abs(rng.normal(size=count))
    outliers[:3] = 40.0
    uniform = rng.uniform(0, 3.3, size=count)
    sparse = np.where(rng.uniform(size=count) < 0.9, 0, np.abs(rng.normal(size=count)) * 0.01)
    named = dict(half_normal=half_normal, heavy=heavy, outliers=outliers, uniform=uniform, sparse=sparse)
    return {k: v.astype(np.float32) for k, v in named.items()}


NAMES = tuple(distributions(10))


def histogram(values, bins=4096):
    """Counts, upper end and largest value as rows, counted by NumPy."""
    amax = float(values.max())
    top = 2.0 ** math.frexp(amax)[1]
    counts = np.histogram(values, bins=bins, range=(0, top))[0]
    return torch.tensor(counts[None]).double(), torch.tensor([top]), torch.tensor([amax])


def data_error(values, amax, bits, unsigned=True):
    """Mean squared error of the data themselves, computed by torch's own kernel in one go."""
    low, high = numerics.bounds(bits, unsigned)
    x = torch.as_tensor(values)
    quantized = torch.fake_quantize_per_tensor_affine(x, float(amax) / high, 0, low, high)
    return float((quantized.double() - x.double()).square().mean())


@pytest.mark.parametrize('bits', BITS)
def test_bounds_are_those_of_twos_complement(bits):
    assert numerics.bounds(bits) == (-(1 << bits) // 2, (1 << bits) // 2 - 1)
    assert numerics.bounds(bits, unsigned=True) == (0, (1 << bits) - 1)


def values_around(amax, high, count=2000):
    """Random values, some of them outside of the range, some of them on ties and on steps."""
    x = torch.randn(count) * amax * 0.6
    step = amax / high
    ties = (torch.arange(-20, 20) + 0.5) * step
    steps = torch.arange(-20, 20) * step
    return torch.cat([x, ties, steps, torch.tensor([0.0, amax, -amax, 3 * amax, -3 * amax])])


@pytest.mark.parametrize('grad', [False, True], ids=['no_grad', 'grad'])
@pytest.mark.parametrize('unsigned', [False, True], ids=['signed', 'unsigned'])
@pytest.mark.parametrize('bits', BITS)
def test_per_tensor_equals_torchs_kernel_bit_for_bit(bits, unsigned, grad):
    low, high = numerics.bounds(bits, unsigned)
    for amax in (0.013, 1.0, 7.7, 1234.5):
        x = values_around(amax, high).requires_grad_(grad)
        amax = torch.tensor(amax)
        with torch.set_grad_enabled(grad):
            mine = numerics.fake_quantize(x, amax, bits, unsigned)
        zero = torch.zeros((), dtype=torch.int32)
        theirs = torch.fake_quantize_per_tensor_affine(x.detach(), amax / high, zero, low, high)
        assert mine.requires_grad is grad
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize('grad', [False, True], ids=['no_grad', 'grad'])
@pytest.mark.parametrize('axis', [0, 1, 2])
@pytest.mark.parametrize('bits', BITS)
def test_per_channel_equals_torchs_kernel_bit_for_bit(bits, axis, grad):
    low, high = numerics.bounds(bits)
    x = torch.randn(6, 5, 7).requires_grad_(grad)
    amax = torch.rand(x.shape[axis]) * 2 + 0.01
    with torch.set_grad_enabled(grad):
        mine = numerics.fake_quantize(x, amax, bits, axis=axis)
    zero = torch.zeros(len(amax), dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(x.detach(), amax / high, zero, axis, low, high)
    assert mine.requires_grad is grad
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize('unsigned', [False, True])
@pytest.mark.parametrize('bits', [2, 3, 4, 8, 12, 16])
def test_every_result_is_the_nearest_step(bits, unsigned):
    low, high = numerics.bounds(bits, unsigned)
    amax = 2.3
    step = amax / high
    for x in values_around(amax, high, 150).tolist():
        got = float(numerics.fake_quantize(torch.tensor(x), torch.tensor(amax), bits, unsigned))
        integer = round(got / step)
        assert low <= integer <= high
        assert got == pytest.approx(integer * step, rel=1e-5)
        if low * step <= x <= high * step:
            assert abs(got - x) <= step / 2 * (1 + 1e-3)
        else:
            assert integer == (high if x > 0 else low)


@pytest.mark.parametrize('unsigned', [False, True])
@pytest.mark.parametrize('bits', [4, 8, 12])
def test_equals_pytorch_quantization_inside_the_range(bits, unsigned):
    high = numerics.bounds(bits, unsigned)[1]
    amax = torch.tensor(3.7)
    low = 0 if unsigned else -high
    # Both round, but one divides by the step and the other multiplies: not on ties.
    levels = torch.randint(low, high + 1, (5000,)) + (torch.rand(5000) - 0.5) * 0.9
    x = (levels * (amax / high)).clamp(min=float(low) * float(amax), max=float(amax))
    mine = numerics.fake_quantize(x, amax, bits, unsigned)
    theirs = tensor_quant.fake_tensor_quant(x, amax, bits, unsigned)
    assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('unsigned, axis', [(False, None), (True, None), (False, 0)])
def test_the_gradient_is_one_inside_the_range_and_zero_outside(unsigned, axis):
    x = torch.linspace(-3, 3, 601).reshape(1, -1).requires_grad_()
    amax = torch.tensor([1.5]) if axis == 0 else torch.tensor(1.5)
    out = numerics.fake_quantize(x, amax, 8, unsigned, axis)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    step = 1.5 / numerics.bounds(8, unsigned)[1]
    low = 0.0 if unsigned else -1.5 - step
    inside = (x > low) & (x < 1.5)
    # The kernel looks at the rounded integer, so half a step beyond the ends is inside, too.
    outside = (x < low - step) | (x > 1.5 + step)
    assert inside.sum() > 100 and outside.sum() > 100
    assert torch.equal(x.grad[inside], upstream[inside])
    assert not x.grad[outside].any()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('grad', [False, True])
def test_zero_channels_give_zeros(grad, dtype):
    x = torch.randn(3, 50).to(dtype)
    x[1] = 0
    x.requires_grad_(grad)
    amax = x.detach().float().abs().amax(1)
    with torch.set_grad_enabled(grad):
        out = numerics.fake_quantize(x, amax, 8, axis=0)
    assert out.dtype is dtype
    assert torch.isfinite(out.float()).all()
    assert not out[1].any() and out[0].any() and out[2].any()


@pytest.mark.parametrize('grad', [False, True])
def test_a_channel_that_left_its_range_of_zero_stays_finite(grad):
    """After a step of training a weight of zeros is none, but its range may still be the old one."""
    x = torch.randn(2, 50).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        out = numerics.fake_quantize(x, torch.tensor([0.0, 2.0]), 8, axis=0)
    assert torch.isfinite(out).all()
    assert out[0].abs().max() < 1e-20


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('amax', [1e-3, 0.3, 100.0])
@pytest.mark.parametrize('bits', [8, 16])
@pytest.mark.parametrize('grad', [False, True])
def test_half_precision_is_the_rounded_result_of_single_precision(dtype, amax, bits, grad):
    x = (torch.randn(1000) * amax).to(dtype)
    expected = numerics.fake_quantize(x.float(), torch.tensor(amax), bits).to(dtype)
    with torch.set_grad_enabled(grad):
        out = numerics.fake_quantize(x.clone().requires_grad_(grad), torch.tensor(amax), bits)
    assert out.dtype is dtype
    assert torch.equal(out, expected)


def test_the_input_is_not_written_to():
    x = torch.randn(100)
    before = x.clone()
    numerics.fake_quantize(x, torch.tensor(0.5), 4)
    assert torch.equal(x, before)


def test_levels_are_the_grid_of_unsigned_integers():
    x = torch.rand(500) * 5
    expected = torch.fake_quantize_per_tensor_affine(x, 0.25, 0, 0, 15)
    assert torch.allclose(numerics.dequantized_levels(x, torch.tensor(0.25), 15), expected)


def test_sqnr_is_what_its_definition_says():
    reference, noisy = np.array([1.0, -2.0, 3.0]), np.array([1.1, -2.0, 2.8])
    signal, noise = (reference**2).sum(), ((reference - noisy) ** 2).sum()
    expected = 10 * math.log10(signal / noise)
    assert numerics.sqnr_db(torch.tensor(reference), torch.tensor(noisy)) == pytest.approx(expected)
    assert numerics.sqnr_db(torch.ones(3), torch.ones(3)) == math.inf


@pytest.mark.parametrize('percentile', [50.0, 99.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize('name', NAMES)
def test_percentile_is_numpys_within_a_bin(name, percentile):
    values = distributions()[name]
    counts, top, amax = histogram(values)
    got = float(numerics.search_percentile(counts, top, amax, percentile))
    expected = float(np.percentile(values, percentile, method='inverted_cdf'))
    width = float(top) / counts.shape[1]
    assert expected - 1e-6 <= got <= expected + width * 1.001
    assert got <= float(amax)


def lowest_candidate(bits):
    return 0.2 if bits >= 8 else 0.05


@pytest.mark.parametrize('light', [False, True], ids=['mse', 'grid'])
@pytest.mark.parametrize('unsigned', [True, False], ids=['unsigned', 'signed'])
@pytest.mark.parametrize('bits', [4, 8])
@pytest.mark.parametrize('name', NAMES)
def test_mse_finds_the_best_candidate_of_a_brute_force_search_on_the_data(name, bits, unsigned, light):
    values = distributions()[name]
    counts, top, amax = histogram(values)
    high = torch.tensor([float(numerics.bounds(bits, unsigned)[1])])
    lowest = lowest_candidate(bits)
    got = float(numerics.search_mse(counts, top, amax, high, lowest, light=light))
    factors = np.linspace(lowest, 1, 81)
    least = min(data_error(values, float(amax) * f, bits, unsigned) for f in factors)
    found = data_error(values, got, bits, unsigned)
    # Half a per cent is the price of preferring the largest value, half a per cent the histogram's.
    assert found <= least * (1.03 if light else 1.01)
    assert found <= data_error(values, float(amax), bits, unsigned) * (1 + 1e-6)


def assert_never_worse(rows, bits, light):
    """Searches all rows in one call, as the calibration does it; returns how many ranges became smaller."""
    counts, top, amax = (torch.cat(c) for c in zip(*(histogram(r) for r in rows)))
    high = torch.full((len(rows),), float(numerics.bounds(bits, True)[1]))
    got = numerics.search_mse(counts, top, amax, high, lowest_candidate(bits), light=light)
    for row, mine, largest in zip(rows, got.tolist(), amax.tolist()):
        assert 0 < mine <= largest * (1 + 1e-6)
        assert data_error(row, mine, bits) <= data_error(row, largest, bits) * (1 + 1e-5)
    return int((got < amax).sum())


@pytest.mark.parametrize('light', [False, True], ids=['mse', 'grid'])
@pytest.mark.parametrize('bits', [3, 4, 6, 8, 10, 16])
def test_mse_is_never_worse_than_the_largest_value(bits, light):
    rows = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        rows += list(distributions(int(rng.integers(2000, 9000)), seed).values())
        rows.append(np.abs(rng.laplace(size=3000)).astype(np.float32) * np.float32(10 ** rng.uniform(-6, 6)))
        rows.append(np.exp(rng.normal(size=3000) * rng.uniform(0.1, 2)).astype(np.float32))
        rows.append(rng.beta(rng.uniform(0.3, 5), rng.uniform(0.3, 9), size=3000).astype(np.float32))
    smaller = assert_never_worse(rows, bits, light)
    # The search must not keep its promise by never choosing anything.
    assert smaller >= {3: 80, 4: 80, 6: 60, 8: 5}.get(bits, 0)


def migacz(counts, candidates, amax, top, levels):
    """Divergence of each candidate, in plain Python, as the 2017 slides describe it."""
    counts = [0.0, *counts[1:]]
    bins = len(counts)
    width = top / bins
    divergences = []
    for factor in candidates:
        inside = min(max(math.ceil(np.float32(amax) * np.float32(factor) / np.float32(width)), 1), bins)
        p = list(counts[:inside])
        members = {}
        for i in range(inside):
            members.setdefault(i * levels // inside, []).append(i)
        q = [0.0] * inside
        for group in members.values():
            filled = [i for i in group if p[i] > 0]
            for i in filled:
                q[i] = sum(p[j] for j in group) / len(filled)
        p[-1] += sum(counts[inside:])
        sum_p, sum_q = max(sum(p), 1), max(sum(q), 1)
        divergence = 0.0
        for a, b in zip(p, q):
            if a > 0:
                divergence += a / sum_p * math.log(max(a / sum_p, 1e-12) / max(b / sum_q, 1e-12))
        divergences.append(divergence)
    return divergences


@pytest.mark.parametrize('bits, unsigned', [(8, False), (8, True), (4, False), (4, True)])
@pytest.mark.parametrize('name', NAMES)
def test_entropy_finds_the_least_divergence_of_a_plain_python_search(name, bits, unsigned):
    counts, top, amax = histogram(distributions()[name], bins=1024)
    high = torch.tensor([float(numerics.bounds(bits, unsigned)[1])])
    got = float(numerics.search_entropy(counts, top, amax, high)) / float(amax)
    candidates = torch.linspace(0.25, 1, 61).tolist()
    divergences = migacz(counts[0].tolist(), candidates, float(amax), float(top), int(high) + 1)
    index = min(range(61), key=lambda i: abs(candidates[i] - got))
    assert got == pytest.approx(candidates[index], rel=1e-5)
    assert divergences[index] <= min(divergences) + 1e-9
    assert max(divergences) > min(divergences)


def test_entropy_searches_rows_of_different_widths_together():
    data = distributions()
    rows = [histogram(data[n], bins=512) for n in NAMES]
    counts, top, amax = (torch.cat(c) for c in zip(*rows))
    high = torch.tensor([127.0, 255.0, 7.0, 15.0, 127.0])
    together = numerics.search_entropy(counts, top, amax, high)
    for i, row in enumerate(rows):
        assert torch.equal(numerics.search_entropy(*row, high[i : i + 1])[0], together[i])


def weights():
    """Eight output channels, each of another shape; the last but one is nearly, the last all zeros."""
    rows = torch.randn(8, 4, 3, 3)
    rows[1] = rows[1].abs() ** 3
    rows[2] = -torch.rand(4, 3, 3)
    rows[3, 0, 0, 0] = 30
    rows[4] *= 1e-4
    rows[5] = torch.distributions.StudentT(2.0).sample((4, 3, 3))
    rows[6] = 0
    rows[6, 1, 1, 1] = 0.5
    rows[7] = 0
    return rows


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('calibrator', ['mse', 'grid'])
def test_weight_ranges_against_brute_force_per_channel(calibrator, bits):
    rows = weights()
    got = numerics.weight_amax(rows, bits, calibrator)
    steps = 14 if calibrator == 'grid' else 41
    factors = torch.linspace(0.5 if bits >= 8 else 0.2, 1, steps).tolist()
    high = numerics.bounds(bits)[1]
    assert got.shape == (8,)
    for c in range(7):
        largest = float(rows[c].abs().max())
        magnitudes = rows[c].abs()
        errors = [
            float(
                (
                    torch.fake_quantize_per_tensor_affine(magnitudes, f * largest / high, 0, 0, high)
                    - magnitudes
                )
                .double()
                .square()
                .mean()
            )
            for f in factors
        ]
        chosen = min(range(steps), key=lambda i: abs(factors[i] * largest - float(got[c])))
        assert float(got[c]) == pytest.approx(factors[chosen] * largest, rel=1e-5)
        assert errors[chosen] <= min(errors) * (1 + 1e-3) + 1e-18
        # On the signed data themselves: never worse than the largest value.
        mine = data_error(rows[c], got[c], bits, unsigned=False)
        assert mine <= data_error(rows[c], largest, bits, unsigned=False) * (1 + 1e-6) + 1e-18
    assert got[7] == 0


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extremes_are_the_smallest_and_largest_element(dtype):
    x = (torch.randn(7, 3) * 100).to(dtype)
    values = [float(v) for v in x.flatten()]
    assert numerics.extremes(x).tolist() == [min(values), max(values)]
    assert numerics.extremes(x[:1, :1]).tolist() == [values[0], values[0]]
    for dim in (0, 1):
        expected = torch.stack([x.float().amin(dim), x.float().amax(dim)])
        assert torch.equal(numerics.extremes(x, dim).float(), expected)


def test_weight_ranges_of_max_are_the_largest_magnitudes():
    rows = weights()
    expected = [max(abs(v) for v in row.flatten().tolist()) for row in rows]
    assert numerics.weight_amax(rows, 8, 'max').tolist() == expected


@pytest.mark.parametrize('percentile', [50.0, 90.0, 99.0, 99.99, 100.0])
def test_weight_ranges_of_percentile_are_order_statistics(percentile):
    rows = torch.randn(5, 1000)
    got = numerics.weight_amax(rows, 8, 'percentile', percentile)
    for c in range(5):
        magnitudes = sorted(rows[c].abs().tolist())
        assert float(got[c]) in magnitudes
        inside = sum(m <= float(got[c]) for m in magnitudes)
        assert percentile * 10 <= inside <= percentile * 10 + 1


def test_weight_ranges_of_a_parameter_need_no_gradient():
    weight = torch.nn.Parameter(torch.randn(4, 9))
    for calibrator in ('max', 'percentile', 'mse', 'grid'):
        assert not numerics.weight_amax(weight, 8, calibrator).requires_grad
