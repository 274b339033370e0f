"""Products of two activations, as in attention: each operand has an input quantizer of its own."""

from torch import Tensor, nn

from q3d_plugin.layers.base import QuantUnit

__all__ = ['FLOAT_PRODUCT', 'QuantHeadedProduct', 'QuantMatMul', 'QuantOperand']

FLOAT_PRODUCT = 'a product of two activations'
"""Why an operand is float by default. Neither is a weight, which has a range for each channel, and the scores
go into a softmax, which magnifies errors. In the study (part C) softmax and transposes stay float, too."""


class QuantOperand(QuantUnit):
    """One operand of a product: a unit without a weight, which passes its input through its quantizer."""

    kind = 'MatMul'
    family = 'matmul'
    float_by_default = FLOAT_PRODUCT

    def __init__(self) -> None:
        super().__init__()
        self._init_unit()

    def forward(self, x: Tensor) -> Tensor:
        return self.quantize_input(x)


class QuantMatMul(nn.Module):
    """``a @ b`` of two activations, whose operands are the units ``left`` and ``right``.

    Each operand has one range for its whole tensor, as engines have it (TensorRT and OpenVINO run a MatMul in
    INT8 where both of its inputs are quantized per tensor). The two may differ: an attention's weights lie in
    [0, 1], whatever the range of its values. Both are float until the recipe's ``include`` names them; a
    pattern that means the product means both.

    Shape:
        - Inputs and output: those of ``torch.matmul``.

    Examples:
        >>> import torch
        >>> product = QuantMatMul()
        >>> product(torch.ones(2, 3), torch.ones(3, 1)).tolist()
        [[3.0], [3.0]]
    """

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = QuantOperand(), QuantOperand()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.left(a) @ self.right(b)


class QuantHeadedProduct(QuantMatMul):
    """The weighted sums of an attention: the weights of each head times the values of that head.

    Each channel of the output is a sum over that channel of the values, so that a scale of a channel passes
    through: SmoothQuant may move that of the output's reader to who makes the values
    (:class:`~q3d_plugin.transforms.graph.ChannelGraph`).

    Shape:
        - weights: (B, heads, N, M); values: (B, M, C), the channels of one head side by side.
        - Output: (B, N, C).

    Examples:
        >>> import torch
        >>> product = QuantHeadedProduct()
        >>> weights = torch.tensor([[[[0.5, 0.5]], [[0.0, 1.0]]]])  # two heads, which read two places
        >>> product(weights, torch.tensor([[[1.0, 10.0], [3.0, 30.0]]])).tolist()
        [[[2.0, 30.0]]]
    """

    def forward(self, weights: Tensor, values: Tensor) -> Tensor:
        batch, heads, length, _ = weights.shape
        values = values.reshape(batch, values.shape[1], heads, -1).transpose(1, 2)
        return super().forward(weights, values).transpose(1, 2).reshape(batch, length, -1)

    def channel_source(self, weights: Tensor, values: Tensor) -> Tensor:
        """The input that the channels of the output come from."""
        return values
