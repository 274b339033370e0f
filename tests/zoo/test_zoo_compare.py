"""Recorded outputs and their differences."""

import math

import pytest
import torch

from q3d_plugin.zoo.compare import compare, sample


def test_differences_are_relative_to_the_largest_value():
    a = sample([torch.tensor([100.0, 1.0]), {'b': torch.tensor([2])}])
    assert len(a) == 1
    b = sample(torch.tensor([100.0, 2.0]))
    assert compare({'n': [a]}, {'n': [b]}) == (pytest.approx(0.01), 'n')
    assert compare({'n': [a]}, {})[0] == math.inf
    assert compare({'n': [a]}, {'n': [sample(torch.zeros(3))]})[0] == math.inf
    assert compare({'n': [a]}, {'n': [sample(torch.tensor([100.0, math.nan]))]})[0] == math.inf
    assert compare({}, {}) == (None, '')
