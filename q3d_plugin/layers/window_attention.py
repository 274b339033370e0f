"""Attention within windows (Swin): its two matrix products are units that the recipe can switch on."""

from typing import Optional

from torch import Tensor

from q3d_plugin.layers.matmul import QuantHeadedProduct, QuantMatMul

__all__ = ['WindowAttention']


class WindowAttention:
    """Put before a window attention of a framework, so that its products are modules.

    Of Liu et al. 2021, "Swin Transformer", section 3.2: softmax(q k^T / sqrt(d) + bias) v within each window.
    mmdet's ``WindowMSA`` and OpenPCDet's copy of it have the attributes that are read here: ``num_heads``,
    ``scale``, ``qkv``, ``proj``, ``attn_drop``, ``proj_drop``, ``softmax``, ``window_size``,
    ``relative_position_bias_table`` and ``relative_position_index``.

    ``query_key`` (the scores) and ``attention_value`` (the weighted sums) are float unless the recipe's
    ``include`` names them, as are softmax and position bias always. So are the additions of the block around
    it, ``x + attention(x)`` and ``x + ffn(x)``: no ReLU follows, the sum is read by a LayerNorm in float, and
    the residual stream has the outliers of the whole backbone. NVIDIA's INT8 graphs of transformers keep them
    in FP16, too.
    """

    def setup_quant(self) -> None:
        """Makes the products."""
        self.query_key, self.attention_value = QuantMatMul(), QuantHeadedProduct()

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Attention of each window to itself.

        Args:
            x: (windows * B, N, C) the positions of each window.
            mask: (windows, N, N) what is added to the scores of shifted windows, from -inf to 0.

        Returns:
            Tensor: As ``x``.
        """
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = self.query_key(self._by_head(q) * self.scale, self._by_head(k).transpose(-2, -1))
        scores = scores + self._position_bias()
        if mask is not None:
            windows, shape = mask.shape[0], scores.shape
            scores = scores.view(-1, windows, *shape[1:]) + mask[None, :, None]
            scores = scores.view(shape)
        weights = self.attn_drop(self.softmax(scores))
        return self.proj_drop(self.proj(self.attention_value(weights, v)))

    def _by_head(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, heads, N, C / heads)."""
        return x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def _position_bias(self) -> Tensor:
        """(heads, N, N) what the place of a key relative to the query adds to its score."""
        index = self.relative_position_index
        bias = self.relative_position_bias_table[index.reshape(-1)]
        return bias.reshape(*index.shape, -1).permute(2, 0, 1)
