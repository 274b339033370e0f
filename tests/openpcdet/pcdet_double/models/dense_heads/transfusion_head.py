"""Queries at the peaks of a heatmap attend to the map."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from ..model_utils.basic_block_2d import BasicBlock2D
from ..model_utils.transfusion_utils import PositionEmbeddingLearned, TransformerDecoderLayer


class SeparateHead_Transfusion(nn.Module):
    def __init__(self, input_channels, head_channels, kernel_size, sep_head_dict, use_bias=False):
        super().__init__()
        self.sep_head_dict = sep_head_dict
        for name, branch in sep_head_dict.items():
            layers = []
            for _ in range(branch['num_conv'] - 1):
                layer = nn.Conv1d(input_channels, head_channels, kernel_size, bias=use_bias)
                layers.append(nn.Sequential(layer, nn.BatchNorm1d(head_channels), nn.ReLU()))
            layers.append(nn.Conv1d(head_channels, branch['out_channels'], kernel_size))
            setattr(self, name, nn.Sequential(*layers))

    def forward(self, x):
        return {name: getattr(self, name)(x) for name in self.sep_head_dict}


class TransFusionHead(nn.Module):
    def __init__(
        self,
        model_cfg,
        input_channels,
        num_class,
        class_names,
        grid_size,
        point_cloud_range,
        voxel_size,
        predict_boxes_when_training=True,
    ):
        super().__init__()
        self.model_cfg, self.num_classes = model_cfg, num_class
        self.num_proposals, self.nms_kernel_size = model_cfg.NUM_PROPOSALS, model_cfg.NMS_KERNEL_SIZE
        hidden, bias = model_cfg.HIDDEN_CHANNEL, model_cfg.get('USE_BIAS_BEFORE_NORM', False)
        self.shared_conv = nn.Conv2d(input_channels, hidden, 3, padding=1)
        self.heatmap_head = nn.Sequential(
            BasicBlock2D(hidden, hidden, kernel_size=3, padding=1, bias=bias),
            nn.Conv2d(hidden, num_class, 3, padding=1),
        )
        self.class_encoding = nn.Conv1d(num_class, hidden, 1)
        places = [PositionEmbeddingLearned(2, hidden) for _ in range(2)]
        rest = model_cfg.NUM_HEADS, model_cfg.FFN_CHANNEL, model_cfg.DROPOUT, model_cfg.ACTIVATION
        self.decoder = TransformerDecoderLayer(hidden, *rest, *places)
        heads = copy.deepcopy(model_cfg.SEPARATE_HEAD_CFG.HEAD_DICT)
        heads['heatmap'] = dict(out_channels=num_class, num_conv=model_cfg.NUM_HM_CONV)
        self.prediction_head = SeparateHead_Transfusion(hidden, 64, 1, heads, use_bias=bias)
        sizes = [int(grid_size[i]) // model_cfg.TARGET_ASSIGNER_CONFIG.FEATURE_MAP_STRIDE for i in (0, 1)]
        grid = torch.meshgrid(*(torch.arange(size) + 0.5 for size in sizes), indexing='ij')
        self.bev_pos = torch.stack(grid, -1).view(1, -1, 2)

    def predict(self, inputs):
        x = self.shared_conv(inputs)
        flat, places = x.flatten(2), self.bev_pos.repeat(len(x), 1, 1).to(x.device)
        heatmap = self.heatmap_head(x)
        scores, pad = heatmap.detach().sigmoid(), self.nms_kernel_size // 2
        largest = F.max_pool2d(scores, self.nms_kernel_size, stride=1)
        peaks = (scores * (scores == F.pad(largest, [pad] * 4))).flatten(2)
        best = peaks.flatten(1).argsort(dim=-1, descending=True)[:, : self.num_proposals]
        labels, index = best // peaks.shape[-1], best % peaks.shape[-1]
        query = flat.gather(-1, index[:, None].expand(-1, flat.shape[1], -1))
        query = query + self.class_encoding(F.one_hot(labels, self.num_classes).transpose(1, 2).float())
        position = places.gather(1, index[..., None].expand(-1, -1, 2)).flip(dims=[-1])
        out = self.prediction_head(self.decoder(query, flat, position, places.flip(dims=[-1])))
        out['center'] = out['center'] + position.transpose(1, 2)
        out['query_heatmap_score'] = peaks.gather(-1, index[:, None].expand(-1, self.num_classes, -1))
        out['dense_heatmap'] = heatmap
        return out

    def forward(self, batch_dict):
        found = self.predict(batch_dict['spatial_features_2d'])
        batch_dict['final_box_dicts'] = [found]
        return batch_dict
