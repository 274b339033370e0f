"""Near matches at the end of error messages."""

import pytest

from q3d_plugin.errors import Q3DError, near_matches


def test_error_is_a_value_error():
    with pytest.raises(ValueError, match='here'):
        raise Q3DError('here')


def test_a_near_word_is_suggested_and_a_far_one_is_not():
    text = near_matches('wieght', ['activation', 'weight', 'skip'])
    assert text == "; did you mean 'weight'?"


def test_no_more_than_count_words_are_suggested():
    known = [f'layer{i}' for i in range(9)]
    text = near_matches('layer', known, count=2)
    assert text.startswith('; did you mean')
    assert sum(repr(k) in text for k in known) == 2


def test_everything_known_is_listed_where_nothing_is_near():
    text = near_matches('zzz', ['alpha', 'beta'])
    assert text == "; known: 'alpha', 'beta'"


@pytest.mark.parametrize('number', [8, 9, 30])
def test_long_lists_are_cut_and_counted(number):
    known = [f'name_{i:02d}' for i in range(number)]
    text = near_matches('?', known)
    listed = [k for k in known if repr(k) in text]
    assert listed == known[:8]
    assert ('more' in text) == (number > 8)
    if number > 8:
        assert text.endswith(f'and {number - 8} more')


def test_nothing_known_adds_nothing():
    assert near_matches('anything', []) == ''


def test_what_is_no_text_is_named_all_the_same():
    assert near_matches(7, [1, 2]) == "; known: '1', '2'"
