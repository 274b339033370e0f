"""The decoder layer of TransFusion."""

from torch import nn


class PositionEmbeddingLearned(nn.Module):
    def __init__(self, input_channel, num_pos_feats=288):
        super().__init__()
        first, last = nn.Conv1d(input_channel, num_pos_feats, 1), nn.Conv1d(num_pos_feats, num_pos_feats, 1)
        norm = nn.BatchNorm1d(num_pos_feats)
        self.position_embedding_head = nn.Sequential(first, norm, nn.ReLU(inplace=True), last)

    def forward(self, xyz):
        return self.position_embedding_head(xyz.transpose(1, 2).contiguous())


class TransformerDecoderLayer(nn.Module):
    def __init__(self, d_model, nhead, dim_feedforward, dropout, activation, self_posembed, cross_posembed):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.multihead_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.linear1, self.linear2 = nn.Linear(d_model, dim_feedforward), nn.Linear(dim_feedforward, d_model)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d_model) for _ in range(3))
        self.self_posembed, self.cross_posembed = self_posembed, cross_posembed

    def forward(self, query, key, query_pos, key_pos):
        query_pos = self.self_posembed(query_pos).permute(2, 0, 1)
        key_pos = self.cross_posembed(key_pos).permute(2, 0, 1)
        query, key = query.permute(2, 0, 1), key.permute(2, 0, 1)
        placed = query + query_pos
        query = self.norm1(query + self.self_attn(placed, placed, value=placed)[0])
        attended = self.multihead_attn(query=query + query_pos, key=key + key_pos, value=key + key_pos)[0]
        query = self.norm2(query + attended)
        query = self.norm3(query + self.linear2(self.linear1(query).relu()))
        return query.permute(1, 2, 0)
