"""The fuser of both maps, and the head: queries at the peaks of a heatmap attend to the map."""

import copy

import torch
from mmcv.cnn import ConvModule
from mmdet.models import DetrTransformerDecoderLayer
from mmdet3d.models.dense_heads.centerpoint_head import SeparateHead
from mmdet3d.registry import MODELS
from torch import nn
from torch.nn import functional as F

CONVOLUTION, NORM = dict(type='Conv1d'), dict(type='BN1d')


@MODELS.register_module()
class ConvFuser(nn.Sequential):
    def __init__(self, in_channels, out_channels):
        self.in_channels, self.out_channels = in_channels, out_channels
        convolution = nn.Conv2d(sum(in_channels), out_channels, 3, padding=1, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(out_channels), nn.ReLU(True))

    def forward(self, inputs):
        return super().forward(torch.cat(inputs, dim=1))


class PositionEncodingLearned(nn.Module):
    def __init__(self, input_channel, num_pos_feats):
        super().__init__()
        first, last = nn.Conv1d(input_channel, num_pos_feats, 1), nn.Conv1d(num_pos_feats, num_pos_feats, 1)
        norm = nn.BatchNorm1d(num_pos_feats)
        self.position_embedding_head = nn.Sequential(first, norm, nn.ReLU(inplace=True), last)

    def forward(self, positions):
        return self.position_embedding_head(positions.transpose(1, 2).contiguous()).transpose(1, 2)


@MODELS.register_module()
class TransformerDecoderLayer(DetrTransformerDecoderLayer):
    def __init__(self, pos_encoding_cfg, **kwargs):
        super().__init__(**kwargs)
        self.self_posembed = PositionEncodingLearned(**pos_encoding_cfg)
        self.cross_posembed = PositionEncodingLearned(**pos_encoding_cfg)

    def forward(self, query, key, query_pos, key_pos):
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        query_pos, key_pos = self.self_posembed(query_pos), self.cross_posembed(key_pos)
        both = dict(query_pos=query_pos, key_pos=query_pos)
        query = self.norms[0](self.self_attn(query=query, key=query, value=query + query_pos, **both))
        both['key_pos'] = key_pos
        query = self.norms[1](self.cross_attn(query=query, key=key, value=key + key_pos, **both))
        return self.norms[2](self.ffn(query)).transpose(1, 2)


@MODELS.register_module()
class TransFusionHead(nn.Module):
    def __init__(
        self,
        num_proposals,
        in_channels,
        hidden_channel,
        num_classes,
        num_decoder_layers,
        decoder_layer,
        nms_kernel_size,
        common_heads,
        test_cfg,
        num_heatmap_convs=2,
        bias='auto',
        conv_cfg=CONVOLUTION,
        norm_cfg=NORM,
        **kwargs,
    ):
        super().__init__()
        self.num_proposals, self.num_classes = num_proposals, num_classes
        self.nms_kernel_size, self.test_cfg = nms_kernel_size, test_cfg
        self.shared_conv = nn.Conv2d(in_channels, hidden_channel, 3, padding=1)
        made = dict(kernel_size=3, padding=1, bias=bias, norm_cfg=dict(type='BN2d'))
        self.heatmap_head = nn.Sequential(
            ConvModule(hidden_channel, hidden_channel, **made),
            nn.Conv2d(hidden_channel, num_classes, 3, padding=1),
        )
        self.class_encoding = nn.Conv1d(num_classes, hidden_channel, 1)
        self.decoder, self.prediction_heads = nn.ModuleList(), nn.ModuleList()
        for _ in range(num_decoder_layers):
            heads = {**copy.deepcopy(common_heads), 'heatmap': (num_classes, num_heatmap_convs)}
            made = dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg, bias=bias)
            self.decoder.append(MODELS.build(decoder_layer))
            self.prediction_heads.append(SeparateHead(hidden_channel, heads, **made))
        sizes = [test_cfg['grid_size'][i] // test_cfg['out_size_factor'] for i in (0, 1)]
        grid = torch.meshgrid(*(torch.arange(size) + 0.5 for size in sizes), indexing='ij')
        self.bev_pos = torch.stack(grid, -1).view(1, -1, 2)

    def forward_single(self, inputs, metas):
        x = self.shared_conv(inputs)
        flat, places = x.flatten(2), self.bev_pos.expand(len(x), -1, -1)
        with torch.autocast('cuda', enabled=False):
            heatmap = self.heatmap_head(x.float())
        scores, pad = heatmap.detach().sigmoid(), self.nms_kernel_size // 2
        largest = F.max_pool2d(scores, self.nms_kernel_size, stride=1)
        peaks = (scores * (scores == F.pad(largest, [pad] * 4))).flatten(2)
        best = peaks.flatten(1).argsort(dim=-1, descending=True)[:, : self.num_proposals]
        labels, index = best // peaks.shape[-1], best % peaks.shape[-1]
        self.query_labels = labels
        query = flat.gather(-1, index[:, None].expand(-1, flat.shape[1], -1))
        query = query + self.class_encoding(F.one_hot(labels, self.num_classes).transpose(1, 2).float())
        position = places.gather(1, index[..., None].expand(-1, -1, 2))
        found = []
        for layer, head in zip(self.decoder, self.prediction_heads):
            query = layer(query, key=flat, query_pos=position, key_pos=places)
            out = head(query)
            out['center'] = out['center'] + position.transpose(1, 2)
            found.append(out)
            position = out['center'].detach().transpose(1, 2)
        out = {key: torch.cat([f[key] for f in found], dim=-1) for key in found[0]}
        out['query_heatmap_score'] = peaks.gather(-1, index[:, None].expand(-1, self.num_classes, -1))
        out['dense_heatmap'] = heatmap
        return [out]

    def forward(self, feats, metas):
        return ([self.forward_single(feats[0], metas)[0]],)

    def predict(self, batch_feats, batch_input_metas):
        return self.predict_by_feat(self(batch_feats, batch_input_metas), batch_input_metas)

    def predict_by_feat(self, preds_dicts, metas):
        return preds_dicts
