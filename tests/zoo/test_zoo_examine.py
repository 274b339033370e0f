"""One config, from building to INT8: what is right, what is wrong, and what is the framework's own."""

import math
import time

from torch import nn
from zoo_toys import Net, Words

from q3d_plugin import lifecycle
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import quantize_
from q3d_plugin.zoo.examine import examine
from q3d_plugin.zoo.layers import count_layers
from q3d_plugin.zoo.process import in_process
from q3d_plugin.zoo.rows import Row, failures
from q3d_plugin.zoo.tables import OURS, outcome, reasons, summary


def test_off_is_float():
    row = examine(Words(), 'x', True, True)
    assert row.ours == '' and row.same and row.float_build == row.quant_build == ''
    # conv, head, idle, out_proj and three projections; what is compared: the BatchNorm, head, attention.
    assert row.layers == row.quantized == 7 and (row.compared, row.comparable) == (3, 4)
    assert 1e-4 < row.int8 < 0.5
    assert failures([row]) == []


def test_a_wrong_weight_is_found_and_named():
    def wrong(net):
        model = quantize_(net)

        def spoil(module, _):
            module.conv.weight.data[0] *= 1.01

        model.register_load_state_dict_post_hook(spoil)
        return model

    row = examine(Words(quantize=wrong), 'x', True)
    assert row.difference > 1e-4 and row.worst in ('bn', 'attention', 'head')
    assert row.double > 1e-4 and row.jitter is None and not row.rounding
    assert failures([row]) == [row]


def test_what_rounding_makes_of_the_float_model_is_no_failure():
    row = Row('x', 'y', '', '', forward='', compared=1, difference=2e-4, jitter=1e-4)
    assert not row.same and row.rounding and failures([row]) == []
    assert '1 more but for rounding' in summary([row], 'x') and 'by rounding' in outcome(row)


def test_a_weight_that_is_read_past_its_layer_is_found():
    row = examine(Words(net=lambda: Net(bypass=True)), 'x', True)
    assert row.difference == math.inf and row.worst == 'head'


def test_what_stops_the_float_model_stops_the_other_and_is_told():
    row = examine(Words(stop='no CPU version'), 'x', True)
    assert row.forward == 'NotImplementedError: no CPU version' and row.same and row.ours == ''
    assert 'then NotImplementedError' in outcome(row)


def test_a_failure_of_the_plugin_is_a_row_and_no_crash():
    def broken(net):
        raise RuntimeError('broken here')

    row = examine(Words(quantize=broken), 'x', True)
    assert row.float_build == '' and 'broken here' in row.ours and outcome(row) == OURS
    assert failures([row]) == [row] and '1 failures' in summary([row], 'words')


def test_the_reason_of_the_framework_is_its_first_line():
    row = examine(Words(), 'unreadable', True)
    assert row.float_build == 'ValueError: no such key'
    assert row.ours == '' and row.quant_build is None


def test_a_frame_is_the_same_for_both_models():
    class InPlace(Net):
        def forward(self, x):
            return super().forward(x.mul_(2))

    row = examine(Words(net=InPlace), 'x', True, True)
    assert row.same and row.ours == ''


def test_a_config_that_takes_too_long_is_ended():
    start = time.time()
    row = in_process(Words(), 'slow', False, False, 1, 6)
    assert time.time() - start < 30 and row.float_build == 'not done after 1 s'


def test_shares_are_by_number_and_by_weights():
    model = nn.Module()
    model.a, model.b = (
        quantize_(nn.Sequential(nn.Linear(4, 4))),
        nn.Sequential(nn.Linear(4, 12), nn.LayerNorm(12)),
    )
    model.c, model.d = nn.MultiheadAttention(4, 2), nn.Embedding(100, 100)
    lifecycle.configure(model, Recipe.from_dict({}))
    row = Row('x', 'y')
    count_layers(model, row)
    # Linear 16 of Linear 16 + 48 + attention 48 and 16; neither norm nor embedding counts.
    assert (row.layers, row.quantized, row.elements, row.quantized_elements) == (4, 1, 128, 16)
    assert list(row.left) == ['its part of the model has no Quant type']
    assert 'MultiheadAttention' in reasons(row)
