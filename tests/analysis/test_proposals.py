"""Heads that choose proposals: matched, weighted, and compared with a slow reference."""

import math

import pytest
import torch
from analysis_toys import ToyBench
from fusion_toys import CLASSES, PROPOSALS, FusionToy

from q3d_plugin.analysis.measures import ErrorSums, OutputError
from q3d_plugin.analysis.proposals import RADIUS, align, has_proposals
from q3d_plugin.analysis.replay import Replay
from q3d_plugin.analysis.switch import Switch


def head_outputs(seed=0, proposals=20, prefix='0.0.'):
    """Made-up outputs of a head for one frame: proposals far from each other, scores of all sizes."""
    g = torch.Generator().manual_seed(seed)
    cells = torch.randperm(100, generator=g)[:proposals]
    out = {
        'center': torch.stack([cells % 10, cells // 10])[None] * 10
        + torch.rand(1, 2, proposals, generator=g),
        'dim': torch.randn(1, 3, proposals, generator=g),
        'heatmap': torch.randn(1, CLASSES, proposals, generator=g) * 3,
        'query_heatmap_score': torch.rand(1, CLASSES, proposals, generator=g),
        'dense_heatmap': torch.randn(1, CLASSES, 100, 100, generator=g),
        'query_labels': torch.randint(0, CLASSES, (1, proposals), generator=g),
    }
    return {prefix + k: v for k, v in out.items()}


def reordered(outputs, order):
    """The same proposals in another order."""
    return {k: v if 'dense' in k else v[..., order] for k, v in outputs.items()}


def slowly(reference, outputs, name):
    """Relative L1 of one output, proposal by proposal."""
    r, a = ({k.rpartition('.')[2]: v[0] for k, v in o.items()} for o in (reference, outputs))
    error = total = 0.0
    for p in range(r['query_labels'].shape[-1]):
        label = int(r['query_labels'][p])
        score = float(torch.sigmoid(r['heatmap'][label, p]) * r['query_heatmap_score'][label, p])
        best, least = None, RADIUS
        for q in range(a['query_labels'].shape[-1]):
            distance = math.dist(r['center'][:, p].tolist(), a['center'][:, q].tolist())
            if int(a['query_labels'][q]) == label and distance <= least:
                best, least = q, distance
        corner = [math.floor(c) for c in r['center'][:, p].tolist()] if name == 'center' else [0] * 9
        for i, value in enumerate((r[name][:, p]).tolist()):
            other = float(a[name][i, best]) - corner[i] if best is not None else 0.0
            error += score * abs(value - corner[i] - other)
            total += score * abs(value - corner[i])
    return error / total


def errors_of(reference, outputs):
    error = OutputError()
    error.add(reference, outputs)
    return error


@pytest.mark.parametrize('prefix', ['0.0.', ''])
def test_the_order_of_the_proposals_does_not_matter(prefix):
    reference = head_outputs(prefix=prefix)
    error = errors_of(reference, reordered(reference, torch.arange(19, -1, -1)))
    assert error.relative_l1 < 1e-6
    assert set(error.tensors) == {prefix + n for n in ('center', 'dim', 'heatmap', 'dense_heatmap')}
    # Place by place they have nothing in common.
    naive = ErrorSums()
    naive.add(reference[prefix + 'dim'], reference[prefix + 'dim'].flip(-1))
    assert naive.relative_l1 > 0.5


def test_matched_proposals_are_those_of_a_slow_search():
    reference, other = head_outputs(), reordered(head_outputs(), torch.randperm(20))
    g = torch.Generator().manual_seed(5)
    for name in ('0.0.center', '0.0.dim', '0.0.heatmap'):
        other[name] = other[name] + torch.randn(other[name].shape, generator=g)
    # One has moved away, and one has become another class: both are lost.
    other['0.0.center'][..., 3] += 5
    other['0.0.query_labels'] = other['0.0.query_labels'].clone()
    other['0.0.query_labels'][0, 4] = (other['0.0.query_labels'][0, 4] + 1) % CLASSES
    error = errors_of(reference, other)
    for name in ('center', 'dim', 'heatmap'):
        found = error.tensors[f'0.0.{name}'].relative_l1
        assert found == pytest.approx(slowly(reference, other, name), rel=1e-4), name


def test_a_lost_proposal_counts_as_much_as_its_score():
    reference = head_outputs()
    label = reference['0.0.query_labels'][0]
    score = reference['0.0.heatmap'][0].sigmoid() * reference['0.0.query_heatmap_score'][0]
    order = score[label, torch.arange(20)].argsort()

    def without(place):
        other = {k: v.clone() for k, v in reference.items()}
        other['0.0.center'][..., place] += 1000
        return errors_of(reference, other).relative_l1

    losses = [without(int(p)) for p in order]
    assert losses[0] < 0.01 < 0.03 < losses[-1]
    everything = {k: v + 1000 if 'center' in k else v for k, v in reference.items()}
    lost = errors_of(reference, everything)
    assert all(lost.tensors[f'0.0.{n}'].relative_l1 == pytest.approx(1) for n in ('center', 'dim', 'heatmap'))


@pytest.mark.parametrize('name', ['center', 'dim', 'dense_heatmap'])
def test_what_is_not_finite_is_counted(name):
    reference = head_outputs()
    other = {k: v.clone() for k, v in reference.items()}
    other[f'0.0.{name}'].flatten()[0] = math.nan
    error = errors_of(reference, other)
    assert error.nan == 1


def test_several_decoder_layers_and_what_did_not_change():
    reference = head_outputs()
    both = {
        k: torch.cat([torch.full_like(v, 7), v], -1) if k[4:] in ('center', 'dim', 'heatmap') else v
        for k, v in reference.items()
    }
    left, right = align(both, dict(both))
    assert all(left[k] is right[k] for k in left)
    assert left['0.0.dim'].shape[-1] == 20
    assert torch.equal(left['0.0.dim'], align(reference, reference)[0]['0.0.dim'])


def test_outputs_of_other_heads_are_left_as_they_are():
    reference, outputs = {'a': torch.ones(2), 'heatmap': torch.ones(3)}, {'a': torch.zeros(2)}
    assert align(reference, outputs) == (reference, outputs) and not has_proposals(reference)


@pytest.fixture
def bench():
    bench = ToyBench(model_class=FusionToy)
    bench.prepare(bench.recipe)
    return bench


def test_the_classes_of_the_proposals_are_among_the_raw_outputs(bench):
    outputs = bench.forward(next(iter(bench.frames('val', 1))))
    assert has_proposals(outputs)
    assert outputs['0.0.query_labels'].shape == (1, PROPOSALS)
    assert torch.equal(outputs['0.0.query_labels'], bench.model.head.query_labels)


def test_a_replay_of_a_fusion_detector_gives_what_a_whole_pass_gives(bench):
    switch, replay = Switch(bench.model), Replay(bench.model, bench.forward)
    with switch.restored():
        for batch in bench.frames('val', 2):
            slow = {}
            for name in switch.names:
                switch.only({name})
                slow[name] = bench.forward(batch)
            switch.only(())
            with replay.installed():
                replay.record(batch)
                for name, whole in slow.items():
                    switch.set(name, True)
                    found, computed = replay.replay(batch, [name]), replay.computed
                    switch.set(name, False)
                    assert set(found) == set(whole)
                    assert all(torch.equal(found[k], whole[k]) for k in whole), name
                    # Points and matrices are made anew in each pass, and are the same ones all the same.
                    assert name in computed and ('image.0' not in computed or name == 'image.0')
                    assert 'view.depthnet' not in computed or name in ('image.0', 'view.depthnet')
                    assert not name.startswith('head.boxes') or computed == [name]


def test_a_replayed_head_keeps_the_classes_of_its_own_pass(bench):
    switch, replay = Switch(bench.model), Replay(bench.model, bench.forward)
    batch = next(iter(bench.frames('val', 1)))
    with switch.restored(), replay.installed():
        switch.only(())
        expected = replay.record(batch)['0.0.query_labels'].clone()
        bench.model.head.query_labels = torch.zeros_like(expected)  # as a pass of another variant leaves it
        assert torch.equal(replay.replay(batch, [])['0.0.query_labels'], expected)
