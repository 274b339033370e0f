"""The survey of all configs: on three of the wheel, and its parts on models made here."""

import contextlib
import importlib.util
import io
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip('mmdet3d')

from q3d_plugin import checkpoints, lifecycle
from q3d_plugin.errors import Q3DError
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import quantize_

ROOT = Path(__file__).resolve().parents[2]
RUNS = 'pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-car.py'
STOPS = 'votenet/votenet_8xb16_sunrgbd-3d.py'
FAILS = 'spvcnn/spvcnn_w16_8xb2-amp-15e_semantickitti.py'


@pytest.fixture(scope='module')
def zoo():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location('zoo_tool', ROOT / 'tools' / 'zoo.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope='module')
def finished(zoo, tmp_path_factory):
    """Exit status, standard output and file of a run over three configs."""
    out = tmp_path_factory.mktemp('zoo') / 'new' / 'zoo.json'
    with contextlib.redirect_stdout(io.StringIO()) as text:
        status = zoo.main(['--mmdet3d', '--int8', '--out', str(out), '--only', RUNS, STOPS, FAILS])
    return status, text.getvalue(), out


def rows_of(path):
    return {row['config']: row for row in json.loads(path.read_text())['rows']}


def test_a_config_that_runs_is_compared_layer_by_layer(finished):
    status, _, out = finished
    row = rows_of(out)[RUNS]
    assert status == 0 and row['ours'] == '' and row['quant_build'] == ''
    # 1 linear layer of the pillars, 16 convolutions, 3 transposed ones, 3 of the head.
    assert row['quantized'] == row['layers'] == 23 and row['quantized_elements'] == row['elements'] > 4e6
    assert row['forward'] == '' and row['compared'] == row['comparable'] == 23
    assert 0 < row['difference'] < 1e-4
    assert 1e-3 < row['int8'] < 0.5


def test_a_forward_that_stops_says_why(finished):
    row = rows_of(finished[2])[STOPS]
    assert row['quantized'] == row['layers'] > 0 and row['difference'] is None
    # Its points are sampled by an operator that there is for CUDA only.
    assert 'Error' in row['forward'] and row['compared'] == 0 < row['comparable']


def test_a_config_that_does_not_build_in_float_is_no_failure_of_ours(finished):
    row = rows_of(finished[2])[FAILS]
    assert 'Torchsparse' in row['float_build'] and row['quant_build'] is None and row['ours'] == ''


def test_the_table_has_a_line_for_each_and_one_of_totals(finished):
    text = finished[1]
    for config in (RUNS, STOPS, FAILS):
        assert config in text
    total = text.strip().splitlines()[-1]
    assert total.startswith('mmdet3d: 3 configs, 2 built in float, 2 of these quantized; 1 ran')
    assert '0 failures' in total


def test_resuming_does_what_is_left(zoo, finished, monkeypatch, tmp_path, capsys):
    out = tmp_path / 'zoo.json'
    rows = zoo.read_rows(str(finished[2]))
    zoo.write_rows(str(out), [r for r in rows if r.config != STOPS])
    asked = []

    def in_process(framework, config, *args):
        asked.append(config)
        return zoo.Row(framework.name, config, 'stopped here')

    monkeypatch.setattr(zoo, 'in_process', in_process)
    arguments = ['--mmdet3d', '--out', str(out), '--resume', '--only', RUNS, STOPS, FAILS]
    assert zoo.main(arguments) == 0
    assert asked == [STOPS] and len(rows_of(out)) == 3
    out.write_text('{"rows": [{"nothing": 1}]}')
    with pytest.raises(Q3DError, match='--resume'):
        zoo.main(arguments)


def test_bad_input(zoo, tmp_path):
    with pytest.raises(Q3DError, match='--mmdet3d'):
        zoo.main(['--out', str(tmp_path / 'x.json')])
    with pytest.raises(Q3DError, match='is not a folder'):
        zoo.main(['--mmdet3d', str(tmp_path / 'none'), '--out', str(tmp_path / 'x.json')])
    with pytest.raises(Q3DError, match='none_such'):
        zoo.main(['--mmdet3d', '--only', 'none_such/*', '--out', str(tmp_path / 'x.json')])


class Net(nn.Module):
    """A convolution with BatchNorm, an attention, and a layer whose forward nothing calls."""

    def __init__(self, bypass=False):
        super().__init__()
        self.conv, self.bn = nn.Conv1d(4, 8, 1, bias=False), nn.BatchNorm1d(8)
        self.attention, self.idle, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 8), nn.Linear(8, 3)
        self.bypass = bypass

    def forward(self, x):
        x = self.bn(self.conv(x)).permute(2, 0, 1)
        x = self.attention(x, x, x)[0]
        return self.head(nn.functional.linear(x, self.idle.weight) if self.bypass else x)


class Framework:
    """What a framework is to the script."""

    name = 'made_up'

    def __init__(self, net=Net, quantize=quantize_, stop=''):
        self.net, self.quantize, self.stop = net, quantize, stop

    def read(self, config):
        if config == 'unreadable':
            raise ValueError('no such key\nsecond line')
        return config

    def build(self, cfg, quantized):
        torch.manual_seed(0)
        if cfg == 'slow':
            time.sleep(60)
        return self.quantize(self.net()) if quantized else self.net()

    def load(self, model, state):
        checkpoints.check_state_dict(model, state)
        model.load_state_dict(state)

    def frame(self, cfg, model):
        return torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))

    def run(self, model, frame):
        out = model(frame)
        if self.stop:
            raise NotImplementedError(self.stop)
        return out


def test_off_is_float(zoo):
    row = zoo.examine(Framework(), 'x', True, True)
    assert row.ours == '' and row.same and row.float_build == row.quant_build == ''
    # conv, head, idle, out_proj and three projections; what is compared: the BatchNorm, head, attention.
    assert row.layers == row.quantized == 7 and (row.compared, row.comparable) == (3, 4)
    assert 1e-4 < row.int8 < 0.5
    assert zoo.failures([row]) == []


def test_a_wrong_weight_is_found_and_named(zoo):
    def wrong(net):
        model = quantize_(net)

        def spoil(module, _):
            module.conv.weight.data[0] *= 1.01

        model.register_load_state_dict_post_hook(spoil)
        return model

    row = zoo.examine(Framework(quantize=wrong), 'x', True)
    assert row.difference > 1e-4 and row.worst in ('bn', 'attention', 'head')
    assert row.double > 1e-4 and row.jitter is None and not row.rounding
    assert zoo.failures([row]) == [row]


def test_what_rounding_makes_of_the_float_model_is_no_failure(zoo):
    row = zoo.Row('x', 'y', '', '', forward='', compared=1, difference=2e-4, jitter=1e-4)
    assert not row.same and row.rounding and zoo.failures([row]) == []
    assert '1 more but for rounding' in zoo.summary([row], 'x') and 'by rounding' in zoo.outcome(row)


def test_the_forward_of_an_equal_model_is_run_once(zoo, monkeypatch, tmp_path, capsys):
    class Twins(Framework):
        def __init__(self, *args):
            super().__init__()

        def configs(self):
            return ['a', 'b', 'c', 'unreadable']

        def key(self, cfg):
            return 'other' if cfg == 'c' else 'same'

    monkeypatch.setattr(zoo, 'MMDet3D', Twins)
    assert zoo.main(['--mmdet3d', '--out', str(tmp_path / 'zoo.json')]) == 0
    rows = rows_of(tmp_path / 'zoo.json')
    assert {c: r['twin'] for c, r in rows.items()} == {'a': '', 'b': 'a', 'c': '', 'unreadable': ''}
    assert rows['b']['difference'] == rows['a']['difference'] and rows['b']['quantized'] == 7
    assert '(as a)' in capsys.readouterr().out


def test_a_weight_that_is_read_past_its_layer_is_found(zoo):
    row = zoo.examine(Framework(net=lambda: Net(bypass=True)), 'x', True)
    assert row.difference == math.inf and row.worst == 'head'


def test_what_stops_the_float_model_stops_the_other_and_is_told(zoo):
    row = zoo.examine(Framework(stop='no CPU version'), 'x', True)
    assert row.forward == 'NotImplementedError: no CPU version' and row.same and row.ours == ''
    assert 'then NotImplementedError' in zoo.outcome(row)


def test_a_failure_of_the_plugin_is_a_row_and_no_crash(zoo):
    def broken(net):
        raise RuntimeError('broken here')

    row = zoo.examine(Framework(quantize=broken), 'x', True)
    assert row.float_build == '' and 'broken here' in row.ours and zoo.outcome(row) == zoo.OURS
    assert zoo.failures([row]) == [row] and '1 failures' in zoo.summary([row], 'made_up')


def test_the_reason_of_the_framework_is_its_first_line(zoo):
    row = zoo.examine(Framework(), 'unreadable', True)
    assert row.float_build == 'ValueError: no such key'
    assert row.ours == '' and row.quant_build is None


def test_a_config_that_takes_too_long_is_ended(zoo):
    start = time.time()
    row = zoo.in_process(Framework(), 'slow', False, False, 1, 6)
    assert time.time() - start < 30 and row.float_build == 'not done after 1 s'


def test_shares_are_by_number_and_by_weights(zoo):
    model = nn.Module()
    model.a, model.b = (
        quantize_(nn.Sequential(nn.Linear(4, 4))),
        nn.Sequential(nn.Linear(4, 12), nn.LayerNorm(12)),
    )
    model.c, model.d = nn.MultiheadAttention(4, 2), nn.Embedding(100, 100)
    lifecycle.configure(model, Recipe.from_dict({}))
    row = zoo.Row('x', 'y')
    zoo.share(model, row)
    # Linear 16 of Linear 16 + 48 + attention 48 and 16; neither norm nor embedding counts.
    assert (row.layers, row.quantized, row.elements, row.quantized_elements) == (4, 1, 128, 16)
    assert list(row.left) == ['its part of the model has no Quant type']
    assert 'MultiheadAttention' in zoo.reasons(row)


def test_quant_types_inside_of_another_scope_name_theirs(zoo):
    node = {
        'backbone': {'type': 'SECOND'},
        'img': {'type': 'mmdet.ResNet'},
        'rpn': {'type': 'RPNHead', '_scope_': 'mmdet', 'inner': {'type': 'Unknown'}},
        'heads': [{'type': 'CenterHead'}],
        'float': {'type': 'HardSimpleVFE'},
    }
    assert zoo.put_quant_types(node) == 4
    assert node['backbone']['type'] == 'QuantSECOND' and node['img']['type'] == 'QuantResNet'
    assert node['rpn']['type'] == 'mmdet3d.QuantRPNHead' and node['rpn']['inner']['type'] == 'Unknown'
    assert node['heads'][0]['type'] == 'QuantCenterHead' and node['float']['type'] == 'HardSimpleVFE'


def test_differences_are_relative_to_the_largest_value(zoo):
    a = zoo.sample([torch.tensor([100.0, 1.0]), {'b': torch.tensor([2])}])
    assert len(a) == 1
    b = zoo.sample(torch.tensor([100.0, 2.0]))
    assert zoo.compare({'n': [a]}, {'n': [b]}) == (pytest.approx(0.01), 'n')
    assert zoo.compare({'n': [a]}, {})[0] == math.inf
    assert zoo.compare({'n': [a]}, {'n': [zoo.sample(torch.zeros(3))]})[0] == math.inf
    assert zoo.compare({'n': [a]}, {'n': [zoo.sample(torch.tensor([100.0, math.nan]))]})[0] == math.inf
    assert zoo.compare({}, {}) == (None, '')


def test_made_up_points_are_inside_of_the_range(zoo):
    points = zoo.made_up_points([0, -40, -3, 70, 40, 1], 5, 1000)
    assert points.shape == (1000, 5) and points.dtype.name == 'float32'
    for axis, (low, high) in enumerate([(0, 70), (-40, 40), (-3, 1)]):
        assert low < points[:, axis].min() < points[:, axis].max() < high
