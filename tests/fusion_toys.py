"""A small detector with what replays and comparisons find in BEVFusion alone.

It makes matrices and points anew in each pass, its view transform writes into the points, and its head
chooses proposals.
"""

import torch
from torch import nn

PROPOSALS, CLASSES = 12, 3


class View(nn.Module):
    """Subtracts an offset from the points, in place, and weighs image features by their mean."""

    def __init__(self):
        super().__init__()
        self.depthnet = nn.Conv2d(8, 8, 1)

    def forward(self, x, points, matrix):
        points[0][:, :2] -= matrix[:2, 3]
        return self.depthnet(x) * points[0].mean().abs().clamp(min=0.1)


class ProposalHead(nn.Module):
    """The dense heat map, its peaks, and a box for each of them."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(16, 8, 3, padding=1)
        self.heat = nn.Conv2d(8, CLASSES, 3, padding=1)
        self.boxes = nn.ModuleDict(
            {name: nn.Conv1d(8, n, 1) for name, n in (('center', 2), ('dim', 3), ('heatmap', CLASSES))}
        )

    def forward(self, x, metas):
        features = self.shared(x)
        dense = self.heat(features)
        cells = dense.shape[-1] * dense.shape[-2]
        scores = dense.sigmoid().flatten(2)
        top = scores.flatten(1).argsort(dim=-1, descending=True)[:, :PROPOSALS]
        self.query_labels, place = top // cells, top % cells
        chosen = features.flatten(2).gather(-1, place[:, None].expand(-1, features.shape[1], -1))
        out = {name: layer(chosen) for name, layer in self.boxes.items()}
        width = dense.shape[-1]
        out['center'] = out['center'].tanh() + torch.stack([place % width, place // width], 1) + 0.5
        out['query_heatmap_score'] = scores.gather(-1, place[:, None].expand(-1, CLASSES, -1))
        out['dense_heatmap'] = dense
        return ([out],)

    def predict_by_feat(self, preds_dicts, metas):
        raise AssertionError('the raw outputs are wanted, not the boxes')


class FusionToy(nn.Module):
    """Two branches whose outputs are concatenated, and the head."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.view = View()
        self.lidar = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.head = ProposalHead()

    def forward(self, x):
        metas = [{'frame': 'a'}]
        points = [x[0, :, :4, 0].clone()]
        matrix = x.new_tensor([[1.0, 0, 0, 0.5], [0, 1, 0, 0.25], [0, 0, 1, 0], [0, 0, 0, 1]])
        fused = torch.cat([self.view(self.image(x), points, matrix), self.lidar(x.flip(-1))], 1)
        return self.head.predict_by_feat(self.head(fused + points[0].sum(), metas), metas)
