"""The table of the survey."""

from q3d_plugin.zoo.rows import Row
from q3d_plugin.zoo.tables import table


def test_a_long_reason_does_not_widen_the_other_lines():
    done = Row(
        'x', 'a.py', '', '', 4, 3, 100, 50, {'no Quant type': {'Linear': 1}}, '', '', 4, 4, 1e-6, int8=0.1
    )
    failed = Row('x', 'b.py', 'ImportError: ' + 'long ' * 40)
    header, rule, first, second = table([done, failed]).splitlines()[:4]
    assert len(first) < 180 < len(second) and len(rule) < 180
    assert first.split()[:4] == ['a.py', '4', '75.0%', '50.0%'] and first.endswith(
        '0.100  1 Linear: no Quant type'
    )
    assert header.index('int8') + len('int8') == first.index('0.100') + len('0.100')
