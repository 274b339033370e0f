"""Quantized multi-head attention: its four projections are layers of their own, with quantizers of their own.

``nn.MultiheadAttention`` holds the weights of the projections of query, key and value as raw parameters, and
reads the weight of its ``out_proj`` without calling it (or hands all of them to a fused kernel). Quantizers
have no place in either, so the attention of Vaswani et al. 2017, section 3.2, is written out here. Parameters
and their names stay those of the float module.
"""

import math
from typing import Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from q3d_plugin.errors import Q3DError
from q3d_plugin.layers.base import QuantWeightLayer, converted, register

__all__ = ['QuantMultiheadAttention', 'QuantProjection']


class QuantProjection(QuantWeightLayer):
    """The projection of the query, the key or the value: a linear layer on a parameter of the attention.

    It holds no parameter; :attr:`weight` and :attr:`bias` are views of those of the attention.

    Args:
        attention: Whose projection it is.
        part: 0 for the query, 1 for the key, 2 for the value.
    """

    kind = 'Projection'

    def __init__(self, attention: nn.MultiheadAttention, part: int) -> None:
        super().__init__()
        self._init_unit()
        self.part = part
        # Past nn.Module's own __setattr__, which would make the attention a child of its child.
        self.__dict__['attention'] = attention

    @property
    def weight(self) -> Tensor:
        """(embed_dim, features of the input)."""
        attention = self.attention
        if attention.in_proj_weight is None:
            names = ('q_proj_weight', 'k_proj_weight', 'v_proj_weight')
            return getattr(attention, names[self.part])
        return self._rows(attention.in_proj_weight)

    @property
    def bias(self) -> Optional[Tensor]:
        """(embed_dim,), or None."""
        bias = self.attention.in_proj_bias
        return None if bias is None else self._rows(bias)

    @property
    def in_features(self) -> int:
        """Features of the input."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Features of the output, ``embed_dim``."""
        return self.attention.embed_dim

    def _rows(self, packed: Tensor) -> Tensor:
        size = self.attention.embed_dim
        return packed[self.part * size : (self.part + 1) * size]

    def device(self) -> torch.device:
        return self.weight.device

    def forward(self, input: Tensor) -> Tensor:
        x, weight = self.quantized(input)
        return F.linear(x, weight, self.bias)


def _additive(mask: Optional[Tensor], dtype: torch.dtype, name: str) -> Optional[Tensor]:
    """A mask as what is added to the scores: a boolean one is true where attention is not allowed."""
    if mask is None or torch.is_floating_point(mask):
        return mask
    if mask.dtype != torch.bool:
        raise Q3DError(f'{name}: a mask of {mask.dtype} was given; a boolean or floating one would work')
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float('-inf'))


@register(nn.MultiheadAttention)
class QuantMultiheadAttention(nn.MultiheadAttention):
    """``MultiheadAttention`` whose projections fake-quantize their inputs and weights.

    The projections are the units ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``; scores, softmax and the
    weighted sum stay float, as in the study (part C) and in NVIDIA's INT8 graphs of transformers. With all
    quantizers off it computes what the float module computes. Made by
    :func:`~q3d_plugin.layers.base.converted`.

    Shape:
        - Inputs and outputs: those of ``nn.MultiheadAttention``, batched or not, masks included.
    """

    def _init_unit(self) -> None:
        for part, name in enumerate(('q_proj', 'k_proj', 'v_proj')):
            self.add_module(name, QuantProjection(self, part).train(self.training))
        converted(self.out_proj)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Optional[Tensor] = None,
        need_weights: bool = True,
        attn_mask: Optional[Tensor] = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        if is_causal and attn_mask is None:
            raise Q3DError('attn_mask: missing; is_causal is a hint about the mask, and does not replace it')
        batched = query.dim() == 3
        # Projections work on the last axis, so the batch may come first from here on.
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if not batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        batch, length = q.shape[:2]
        mask = _additive(attn_mask, q.dtype, 'attn_mask')
        if mask is not None and mask.dim() == 3:
            mask = mask.reshape(batch, self.num_heads, *mask.shape[1:])
        padding = _additive(key_padding_mask, q.dtype, 'key_padding_mask')
        if padding is not None:
            padding = padding[:, None, None, :]
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(batch, -1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(batch, -1, -1)], dim=1)
        q, k, v = (self._split_heads(x) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        # What was appended to the keys is never masked.
        extra = (self.bias_k is not None) + self.add_zero_attn
        masks = [F.pad(m, (0, extra)) if extra else m for m in (mask, padding) if m is not None]
        mask = sum(masks) if masks else None
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            out = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(out.transpose(1, 2).reshape(batch, length, self.embed_dim))
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _split_heads(self, x: Tensor) -> Tensor:
        """(batch, length, embed_dim) to (batch, heads, length, head_dim)."""
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)
