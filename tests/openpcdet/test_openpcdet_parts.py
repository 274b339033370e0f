"""The registered Quant types against the float types of the contract double."""

import inspect

import pytest
import torch

from q3d_plugin import lifecycle
from q3d_plugin.coverage import coverage
from q3d_plugin.transforms.sharing import check_sharing

OFF = {'MODE': 'float'}


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_every_quant_type_takes_the_arguments_of_its_float_type(adapter):
    registered = 0
    for part in adapter.parts.PARTS:
        registry = (
            adapter.registries.registry_of(part.section) if part.section not in ('PFE', 'ROI_HEAD') else {}
        )
        if part.base not in registry:
            assert f'Quant{part.base}' not in registry
            continue
        base, quant = registry[part.base], registry[f'Quant{part.base}']
        registered += 1
        assert issubclass(quant, base) and quant.__name__ == f'Quant{part.base}'
        for method in ('forward', 'load_params_from_file', 'load_params_with_optimizer', '_load_state_dict'):
            if hasattr(base, method):
                mine, theirs = (inspect.signature(getattr(c, method)).parameters for c in (quant, base))
                assert list(mine) == list(theirs)
    assert registered == 12
    before = dict(adapter.registries.registry_of('BACKBONE_2D'))
    adapter.parts.register_parts()
    assert before == adapter.registries.registry_of('BACKBONE_2D')


def test_off_is_float(make, outputs):
    reference, model = make(), make(OFF)
    model._load_state_dict(reference.state_dict(), strict=False)
    expected, got = outputs(reference), outputs(model)
    assert expected.keys() == got.keys() and len(got) == 6
    for name in expected:
        assert relative_error(got[name], expected[name]) < 1e-4, name
    assert not [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]


def test_every_layer_is_quantized_and_what_reads_the_same_shares(make, outputs, float_file, run_logger):
    model = make({'TARGET': 'openvino'})
    model.load_params_from_file(str(float_file), run_logger)
    outputs(model)
    rows = {r.name: r for r in coverage(model)}
    assert [r.name for r in rows.values() if not r.quantized] == []
    kinds = [r.kind for r in rows.values()]
    assert kinds.count('Add') == 8 and kinds.count('Concat') == 1
    assert kinds.count('SubMConv3d') == 17 and kinds.count('SparseConv3d') == 4
    heads = model.dense_head.heads_list
    first = {h.center[0][0].input_quantizer for h in heads} | {h.dim[0].input_quantizer for h in heads}
    assert len(first) == 1 and len(first.pop().owners) == 6
    blocks, deblocks = model.backbone_2d.blocks, model.backbone_2d.deblocks
    assert blocks[1][1].input_quantizer is deblocks[0][0].input_quantizer
    assert deblocks[1][0].input_quantizer is not deblocks[0][0].input_quantizer
    # Behind a ReLU the range is unsigned.
    signed = {n for n, r in rows.items() if r.activation.startswith('int8')}
    # With the branch of a residual block, which has both signs, the block's input shares its scale.
    additions = {n for n, r in rows.items() if r.kind == 'Add'}
    inputs = {f'{n[:-4]}.conv1' for n in additions}
    assert signed == additions | inputs | {'backbone_3d.conv_input.0'}


def test_what_reads_one_tensor_is_declared(make, outputs):
    model = make(OFF)
    found = check_sharing(model, lambda: outputs(model))
    quantizer = {n: u.input_quantizer for n, u in lifecycle.units(model)}
    apart = [names for names in found.scales if len({id(quantizer[name]) for name in names}) > 1]
    # Neck and head are parts of their own: these share from calibration on.
    assert apart == [['backbone_2d.concat', 'dense_head.shared_conv.0']]
    # A block pads its input with zeros before its first convolution, which its part says.
    assert found.together == []
    assert model.backbone_2d.blocks[1][1].input_quantizer is model.backbone_2d.deblocks[0][0].input_quantizer


def test_anchor_branches_share_their_input(make):
    head = {'NAME': 'QuantAnchorHeadSingle', 'USE_DIRECTION_CLASSIFIER': True}
    model = make({}, names=(), NAME='QuantSECONDNet', DENSE_HEAD=head)
    layers = [model.dense_head.conv_cls, model.dense_head.conv_box, model.dense_head.conv_dir_cls]
    assert len({layer.input_quantizer for layer in layers}) == 1


@pytest.mark.parametrize('downsample', [False, True])
def test_residual_blocks_of_the_bev_backbone(adapter, downsample):
    """BaseBEVResBackbone's block has a flag and a layer where the sparse ones have a layer or None."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = torch.nn.Conv2d(4, 4, 3, padding=1, bias=False)
            self.bn1, self.relu1 = torch.nn.BatchNorm2d(4), torch.nn.ReLU()
            self.conv2 = torch.nn.Conv2d(4, 4, 3, padding=1, bias=False)
            self.bn2, self.relu2 = torch.nn.BatchNorm2d(4), torch.nn.ReLU()
            self.downsample = downsample
            if downsample:
                self.downsample_layer = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1))

        def forward(self, x):
            identity = self.downsample_layer(x) if self.downsample else x
            out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
            return self.relu2(out + identity)

    from q3d_plugin.transforms.insert import quantize_

    x = torch.randn(1, 4, 6, 6)
    block = Block().eval()
    expected = block(x)
    quant = type('QuantBlock', (adapter.parts._DenseResidual, Block), {})
    model = quantize_(torch.nn.Sequential(block), {Block: quant})
    lifecycle.set_enabled(model, False)
    torch.testing.assert_close(model(x), expected)
    other = model[0].downsample_layer[0] if downsample else model[0].add
    assert model[0].input_layers() == [model[0].conv1, other]
    assert len({layer.input_quantizer for layer in model[0].input_layers()}) == 1


def test_one_cycle_optimizer_finds_every_parameter(make):
    """OpenPCDet collects parameters from the modules that have no children."""

    def leaves(module):
        children = list(module.children())
        return [leaf for child in children for leaf in leaves(child)] if children else [module]

    model = make({})
    found = {id(p) for leaf in leaves(model) for p in leaf.parameters()}
    assert found == {id(p) for p in model.parameters()}


def test_quantizers_move_with_their_layers(make):
    model = make({}).double()
    assert {q._amax.dtype for q in lifecycle.quantizers(model)} == {torch.float64}
    assert not any(q.training for q in lifecycle.quantizers(model.eval()))
