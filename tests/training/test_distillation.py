"""Losses towards the teacher, against slow references place by place."""

import math

import pytest
import torch

from q3d_plugin.errors import Q3DError
from q3d_plugin.recipe import DistillationSpec, Recipe
from q3d_plugin.training.distillation import (
    SEEN,
    HeadMaps,
    HeadOutputs,
    box_loss,
    check_distillation,
    distillation_losses,
    feature_loss,
    heatmap_loss,
)


def maps(seed, *shape):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) - 2


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def peaks(scores):
    """Places of (K, H, W) scores that are at least as high as their neighbours, and seen."""
    count = 0
    for plane in scores.tolist():
        for i, row in enumerate(plane):
            for j, value in enumerate(row):
                near = [plane[a][b] for a in range(i - 1, i + 2) for b in range(j - 1, j + 2)
                        if 0 <= a < len(plane) and 0 <= b < len(row)]  # fmt: skip
                count += value >= SEEN and value == max(near)
    return count


@pytest.mark.parametrize('exponent', [2.0, 1.0])
def test_heatmap_loss_is_the_quality_focal_loss(exponent):
    student, teacher = maps(0, 2, 3, 5, 6), maps(1, 2, 3, 5, 6)
    total = 0.0
    for z, t in zip(student.flatten().tolist(), teacher.flatten().tolist()):
        p, q = sigmoid(z), sigmoid(t)
        total -= abs(q - p) ** exponent * ((1 - q) * math.log(1 - p) + q * math.log(p))
    count = sum(peaks(frame) for frame in teacher.sigmoid())
    assert count > 0
    assert heatmap_loss(student, teacher, exponent).item() == pytest.approx(total / count, rel=1e-4)


def test_heatmap_loss_has_its_minimum_at_the_teacher():
    teacher = maps(1, 1, 2, 4, 4)
    student = teacher.clone().requires_grad_()
    loss = heatmap_loss(student, teacher)
    loss.backward()
    assert loss.item() == 0 and student.grad.abs().max() == 0
    for step in (-0.1, 0.1):
        assert heatmap_loss(teacher + step, teacher) > 0


def test_a_teacher_that_sees_nothing_divides_by_no_zero():
    loss = heatmap_loss(maps(0, 1, 2, 4, 4), torch.full((1, 2, 4, 4), -20.0))
    assert loss.isfinite()
    boxes = {'dim': maps(3, 1, 3, 4, 4)}
    assert box_loss(boxes, {'dim': boxes['dim'] + 1}, torch.full((1, 2, 4, 4), -20.0)) == 0


@pytest.mark.parametrize('shape', [(2, 3, 4, 5), (2, 3, 7)], ids=['map', 'proposals'])
def test_box_loss_counts_places_where_the_teacher_sees_an_object(shape):
    batch, classes, *places = shape
    heat = maps(0, *shape)
    student = {k: maps(i + 1, batch, c, *places) for i, (k, c) in enumerate({'dim': 3, 'vel': 2}.items())}
    teacher = {k: maps(i + 9, *v.shape) for i, (k, v) in enumerate(student.items())}
    total = weights = 0.0
    count = math.prod(places)
    flat = heat.reshape(batch, classes, count)
    for b in range(batch):
        for n in range(count):
            score = max(sigmoid(flat[b, k, n].item()) for k in range(classes))
            if score < SEEN:
                continue
            weights += score
            for k in student:
                mine, other = (v[k].reshape(batch, -1, count)[b, :, n] for v in (student, teacher))
                total += score * sum(abs(x - y) for x, y in zip(mine.tolist(), other.tolist()))
    assert box_loss(student, teacher, heat).item() == pytest.approx(total / max(1, weights), rel=1e-4)


def test_feature_loss_is_a_share_of_the_teachers_power():
    teacher = [maps(0, 1, 2, 4, 4), maps(1, 1, 2, 2, 2)]
    student = [1.1 * teacher[0], 0.8 * teacher[1]]
    assert feature_loss(student, teacher).item() == pytest.approx((0.1**2 + 0.2**2) / 2, rel=1e-4)


def test_weights_of_the_recipe_and_names_of_the_losses():
    def outputs(seed):
        return HeadOutputs(
            [maps(seed, 1, 2, 4, 4)],
            [HeadMaps(maps(seed + 1, 1, 2, 4, 4), {'a': maps(seed + 2, 1, 1, 4, 4)})],
        )

    student, teacher = outputs(0), outputs(5)
    spec = DistillationSpec(heatmap=2.0, boxes=0.5, features=3.0)
    got = distillation_losses(student, teacher, spec)
    mine, other = student.maps[0], teacher.maps[0]
    assert got['heatmap'] == 2 * heatmap_loss(mine.heatmap, other.heatmap)
    assert got['boxes'] == 0.5 * box_loss(mine.boxes, other.boxes, other.heatmap)
    assert got['features'] == 3 * feature_loss(student.features, teacher.features)
    assert set(distillation_losses(student, teacher, DistillationSpec(0.0, 0.0, 1.0))) == {'features'}


def recipe_of(smoothquant=None, **distillation):
    return Recipe.from_dict(
        dict(mode='qat', smoothquant=smoothquant, training=dict(distillation=distillation))
    )


def test_outputs_that_a_detector_lacks_are_refused_with_those_that_it_has():
    with pytest.raises(Q3DError) as caught:
        check_distillation(recipe_of(), ['features'], 'Anchor3DHead')
    message = str(caught.value)
    assert message.startswith('recipe.training.distillation.heatmap: 4.0 was given')
    assert 'Anchor3DHead' in message and message.endswith('distilled here are features')
    check_distillation(recipe_of(heatmap=0, boxes=0), ['features'], 'Anchor3DHead')
    check_distillation(Recipe.from_dict(dict(mode='qat')), [], 'Anchor3DHead')


def test_features_of_a_smoothed_model_are_not_those_of_another_teacher():
    known = ['heatmap', 'boxes', 'features']
    with pytest.raises(Q3DError, match=r'distillation\.features: 1\.0 was given.*SmoothQuant'):
        check_distillation(recipe_of({}, teacher='float.pth'), known, 'CenterHead')
    check_distillation(recipe_of({}, teacher='float.pth', features=0), known, 'CenterHead')
    check_distillation(recipe_of({}), known, 'CenterHead')
