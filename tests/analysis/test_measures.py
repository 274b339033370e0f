"""The sums against the same measures of all values at once."""

import math

import pytest
import torch

from q3d_plugin import numerics
from q3d_plugin.analysis.measures import ErrorSums, OutputError


def test_sums_over_frames_are_those_of_all_values_together():
    generator = torch.Generator().manual_seed(0)
    frames = [torch.randn(3, 40 + i, generator=generator) for i in range(4)]
    close = [f + 0.1 * torch.randn(f.shape, generator=generator) for f in frames]
    sums = ErrorSums()
    for r, a in zip(frames, close):
        sums.add(r, a)
    r, a = (torch.cat([f.flatten() for f in x]).double() for x in (frames, close))
    assert sums.elements == len(r)
    assert sums.l1 == pytest.approx(float((a - r).abs().mean()), rel=1e-5)
    assert sums.relative_l1 == pytest.approx(float((a - r).abs().sum() / r.abs().sum()), rel=1e-5)
    assert sums.sqnr_db == pytest.approx(numerics.sqnr_db(r, a), rel=1e-5)
    assert sums.cosine == pytest.approx(float(torch.cosine_similarity(r, a, dim=0)), rel=1e-5)


def test_values_that_are_not_finite_are_counted_and_do_not_reach_the_measures():
    r = torch.tensor([1.0, 2.0, 3.0, math.inf, 5.0])
    a = torch.tensor([1.0, math.nan, 4.0, 4.0, -math.inf])
    sums = ErrorSums()
    sums.add(r, a)
    assert (sums.nan, sums.inf, sums.float_nonfinite, sums.elements) == (1, 1, 1, 2)
    assert sums.l1 == pytest.approx(0.5)
    assert sums.relative_l1 == pytest.approx(1 / 4)


def test_large_finite_values_are_no_infinities():
    sums = ErrorSums()
    sums.add(torch.full((4,), 1e30), torch.full((4,), 2e30))
    assert (sums.nan, sums.inf, sums.elements) == (0, 0, 4)
    assert sums.relative_l1 == pytest.approx(1.0)
    assert sums.sqnr_db == pytest.approx(0.0, abs=1e-6)


def test_nothing_compared_has_no_measures_and_no_error_no_sqnr():
    empty = ErrorSums()
    empty.add(torch.empty(0), torch.empty(0))
    assert (empty.l1, empty.relative_l1, empty.sqnr_db, empty.cosine) == (None, None, None, None)
    same = ErrorSums()
    same.add(torch.ones(3), torch.ones(3))
    assert (same.l1, same.relative_l1, same.sqnr_db) == (0, 0, None)


def test_output_error_weighs_tensors_alike_and_knows_an_untouched_one():
    big, small = torch.full((10,), 1000.0), torch.ones(10)
    error = OutputError()
    error.add({'big': big, 'small': small}, {'big': big, 'small': small * 1.5})
    assert error.relative_l1 == pytest.approx(0.25)
    # The same tensor and an equal one count alike.
    equal = OutputError()
    equal.add({'big': big, 'small': small}, {'big': big.clone(), 'small': small * 1.5})
    assert equal.relative_l1 == error.relative_l1
    assert equal.tensors['big'].elements == error.tensors['big'].elements
