"""Stripping checkpoints of both frameworks."""

from collections import OrderedDict

import pytest
import torch

from q3d_plugin.commands import main


@pytest.fixture
def state():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(8, 32, 3), torch.nn.BatchNorm2d(32))
    return layers.state_dict()


@pytest.mark.parametrize('options', [[], ['--compress'], ['--half'], ['--half', '--compress']])
@pytest.mark.parametrize('framework', ['mmdet3d', 'openpcdet'])
def test_weights_are_kept_and_the_rest_is_not(state, tmp_path, framework, options):
    optimizer = {'state': {0: torch.randn(50000)}}
    if framework == 'mmdet3d':
        meta = {'dataset_meta': {'classes': ['car']}, 'epoch': 3, 'cfg': 'x' * 9999}
        content, key = {'meta': meta, 'state_dict': state, 'optimizer': optimizer}, 'state_dict'
    else:
        content, key = {'epoch': 3, 'model_state': state, 'optimizer_state': optimizer}, 'model_state'
    torch.save(content, tmp_path / 'in.pth')
    assert main(['strip-checkpoint', str(tmp_path / 'in.pth'), str(tmp_path / 'out.pth'), *options]) == 0
    got = torch.load(tmp_path / 'out.pth', weights_only=True)
    assert set(got) == ({'meta', key} if framework == 'mmdet3d' else {key})
    if framework == 'mmdet3d':
        assert got['meta'] == {'dataset_meta': {'classes': ['car']}, 'epoch': 3}
    assert list(got[key]) == list(state)
    for name, tensor in state.items():
        narrow = '--half' in options and tensor.dim() > 1
        assert torch.equal(got[key][name], tensor.half() if narrow else tensor)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ['in.pth', 'out.pth']
    assert (tmp_path / 'out.pth').stat().st_size < (tmp_path / 'in.pth').stat().st_size / 5


def test_compressed_files_are_smaller(tmp_path):
    torch.save({'model_state': OrderedDict(a=torch.zeros(20000))}, tmp_path / 'in.pth')
    sizes = []
    for options in ([], ['--compress']):
        assert main(['strip-checkpoint', str(tmp_path / 'in.pth'), str(tmp_path / 'out.pth'), *options]) == 0
        sizes.append((tmp_path / 'out.pth').stat().st_size)
    assert sizes[1] < sizes[0] / 10


@pytest.mark.parametrize('content', [{'weights': 1}, [1, 2]])
def test_what_is_no_checkpoint_is_refused(tmp_path, capsys, content):
    torch.save(content, tmp_path / 'in.pth')
    (tmp_path / 'out.pth').write_text('kept')
    assert main(['strip-checkpoint', str(tmp_path / 'in.pth'), str(tmp_path / 'out.pth')]) == 2
    assert 'model_state' in capsys.readouterr().err
    assert (tmp_path / 'out.pth').read_text() == 'kept'


def test_files_and_folders_that_are_not_there_are_named(state, tmp_path, capsys):
    assert main(['strip-checkpoint', str(tmp_path / 'none.pth'), str(tmp_path / 'out.pth')]) == 2
    assert 'none.pth' in capsys.readouterr().err
    torch.save({'model_state': state}, tmp_path / 'in.pth')
    assert main(['strip-checkpoint', str(tmp_path / 'in.pth'), str(tmp_path / 'no' / 'out.pth')]) == 2
    assert 'does not exist' in capsys.readouterr().err
