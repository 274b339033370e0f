"""Raw outputs of a head that chooses proposals, made comparable between two models.

TransFusionHead takes the highest peaks of a dense heat map as proposals and gives a box for each. A tiny
error changes which peaks are taken and in which order, so its outputs cannot be compared place by place.
What is compared instead:

- the dense heat map, before the choice, as it is;
- the outputs of each proposal of the float model with those of the nearest proposal of the same class that
  the other model has within :data:`RADIUS`. Where it has none, the proposal counts as lost: its outputs are
  compared with zeros, an error of 100%. Every proposal weighs as much as its score in the float model, so
  that the many of the background, which come and go, hardly count.

Scores gathered from the heat map after its suppression of neighbours are left out.
"""

from collections.abc import Mapping
from typing import Dict, List, Tuple

import torch
from torch import Tensor

__all__ = ['LABELS', 'RADIUS', 'WORDS', 'align', 'has_proposals']

LABELS = 'query_labels'
"""Last part of the name of the classes of the proposals, (B, P) integers."""
DENSE, SCORES, CENTRES, LOGITS = 'dense_heatmap', 'query_heatmap_score', 'center', 'heatmap'
RADIUS = 3.0
"""Distance of two centres up to which they are of the same proposal, in cells of the heat map. A cell of a
full-size detector has 0.6 m, and nuScenes matches boxes up to 2 m in the middle."""
WORDS = (
    "The head chooses proposals. Compared are the dense heat map, and the outputs of the float model's "
    'proposals, weighted by their scores, with those of the nearest proposal of the same class within '
    f'{RADIUS:g} cells; one that is lost counts as an error of 100%.'
)
"""What is compared, for a reader of the results."""


def has_proposals(outputs: Mapping[str, Tensor]) -> bool:
    """Whether raw outputs are of a head that chooses proposals."""
    return bool(_groups(outputs))


def align(
    reference: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
) -> Tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Both raw outputs with tensors that can be compared place by place.

    Args:
        reference: Of the float model, by name.
        outputs: Of the other model, the same names.

    Returns:
        tuple: Both as they are where no head chooses proposals. A tensor of both that was the same object
        still is.
    """
    groups = _groups(reference)
    if not groups:
        return reference, outputs
    left, right = dict(reference), dict(outputs)
    for prefix in groups:
        names = {n: n[len(prefix) :] for n in reference if n.startswith(prefix)}
        r = {short: reference[name] for name, short in names.items()}
        a = {short: outputs[name] for name, short in names.items()}
        made_r, made_a = _of_group(r, a)
        for name, short in names.items():
            for whole, made in ((left, made_r), (right, made_a)):
                if short in made:
                    whole[name] = made[short]
                elif short != DENSE:
                    whole.pop(name, None)
    return left, right


def _groups(outputs: Mapping[str, Tensor]) -> List[str]:
    """The prefixes of the names of each head that chooses proposals."""
    return [
        name[: -len(LABELS)]
        for name in outputs
        if name.endswith(LABELS)
        and all(name[: -len(LABELS)] + other in outputs for other in (DENSE, SCORES, CENTRES, LOGITS))
    ]


def _of_group(r: Mapping[str, Tensor], a: Mapping[str, Tensor]) -> Tuple[Dict, Dict]:
    """The outputs by proposal of one head, matched and weighted."""
    count = r[LABELS].shape[-1]
    # Of several decoder layers, the last one's proposals come last.
    by_proposal = [
        n for n, t in r.items() if n not in (DENSE, SCORES, LABELS) and t.dim() == 3 and t.shape[-1] >= count
    ]
    if all(r[n] is a[n] for n in (*by_proposal, SCORES, LABELS)):
        same = _weighted({n: r[n][..., -count:] for n in by_proposal}, r, count)
        return same, same
    last_r = {n: r[n][..., -count:].float() for n in by_proposal}
    last_a = {n: a[n][..., -count:].float() for n in by_proposal}
    nearest, found = _match(last_r[CENTRES], last_a[CENTRES], r[LABELS], a[LABELS])
    corner = last_r[CENTRES].floor()
    for name in by_proposal:
        if not torch.isfinite(last_a[name]).all():
            continue  # what is broken is counted, wherever it stands
        place = nearest[:, None].expand(-1, last_a[name].shape[1], -1)
        chosen = last_a[name].gather(-1, place)
        if name == CENTRES:
            # Within the cell of the float model's: how far the vehicle is away is no part of an error.
            chosen = chosen - corner
        last_a[name] = chosen * found[:, None]
    if torch.isfinite(a[CENTRES][..., -count:]).all():
        last_r[CENTRES] = last_r[CENTRES] - corner
    return _weighted(last_r, r, count), _weighted(last_a, r, count)


def _match(centres: Tensor, others: Tensor, labels: Tensor, other_labels: Tensor) -> Tuple[Tensor, Tensor]:
    """For each proposal the place of the nearest other one of its class, and whether that is near enough.

    Args:
        centres: (B, 2, P) in cells.
        others: (B, 2, P) in cells.
        labels: (B, P).
        other_labels: (B, P).

    Returns:
        tuple: (B, P) integers and (B, P) floats, 0 or 1.
    """
    distance = torch.cdist(centres.transpose(1, 2), others.transpose(1, 2))
    distance = distance.nan_to_num(nan=torch.inf)
    distance = distance.masked_fill(labels[:, :, None] != other_labels[:, None, :], torch.inf)
    least, place = distance.min(-1)
    return place, (least <= RADIUS).float()


def _weighted(tensors: Mapping[str, Tensor], r: Mapping[str, Tensor], count: int) -> Dict[str, Tensor]:
    """Tensors (B, C, P) times the scores of the float model's proposals, whose mean becomes one."""
    label = r[LABELS][:, None]
    score = r[LOGITS][..., -count:].float().sigmoid().gather(1, label) * r[SCORES].float().gather(1, label)
    score = score.nan_to_num(nan=0.0)
    mean = score.mean()
    weight = score / mean if mean > 0 else torch.ones_like(score)
    return {name: tensor * weight for name, tensor in tensors.items()}
