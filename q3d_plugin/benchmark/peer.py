"""The peer, pytorch-quantization: its calibrators, which see the same tensors in the same run, and its fake
quantization in training."""

import copy
from collections.abc import Callable
from typing import List, Optional

from torch import Tensor, nn

from q3d_plugin import lifecycle
from q3d_plugin.benchmark.subject import Subject, weight_layers
from q3d_plugin.quantizer import Quantizer

__all__ = ['Peer', 'peer_model']


def peer_model(model: nn.Module) -> nn.Module:
    """A copy of a calibrated model whose quantizers compute as those of pytorch-quantization do in training.

    Layers that share a tensor go on sharing its quantized copy, which spares the peer some work.

    Args:
        model: Calibrated.
    """
    copied = copy.deepcopy(model)
    for quantizer in lifecycle.quantizers(copied):
        if quantizer.has_range:
            quantizer._quantize = _peer_of(quantizer)
    return copied


def _peer_of(quantizer: Quantizer) -> Callable[[Tensor, Optional[Tensor], bool], Tensor]:
    """In place of :meth:`Quantizer._quantize`: a TensorQuantizer with the same range."""
    from pytorch_quantization.nn import TensorQuantizer
    from pytorch_quantization.tensor_quant import QuantDescriptor

    axis = quantizer.axis if quantizer.per_channel else None
    given = QuantDescriptor(num_bits=quantizer.num_bits, axis=axis, unsigned=quantizer.unsigned)
    peer, amax = TensorQuantizer(given), quantizer.amax

    def quantize(x: Tensor, _: Optional[Tensor], inplace: bool = False) -> Tensor:
        if peer.amax is None:
            # It broadcasts its range, which has to have every dimension of the tensor.
            shape = [1] * x.dim()
            if axis is not None:
                shape[axis] = -1
            peer.register_buffer('_amax', amax.reshape(shape if axis is not None else ()))
        return peer(x)

    return quantize


class Peer:
    """pytorch-quantization's calibrators, one per activation quantizer of a :class:`Subject`.

    Args:
        subject: Whose tensors they see.

    Attributes:
        max: MaxCalibrators of the last :meth:`run_max`.
        histograms: HistogramCalibrators of the last :meth:`run_histogram`.
    """

    def __init__(self, subject: Subject) -> None:
        from absl import logging
        from pytorch_quantization import calib

        logging.set_verbosity(logging.ERROR)
        self.calib, self.subject = calib, subject
        self.max: List = []
        self.histograms: List = []

    def run_max(self) -> None:
        """A forward pass with MaxCalibrators."""
        self.max = [self.calib.MaxCalibrator(q.spec.bits, None, q.unsigned) for q in self.subject.activations]
        self.subject.visit(lambda i, x: self.max[i].collect(x))

    def run_histogram(self) -> None:
        """A forward pass with HistogramCalibrators."""
        self.histograms = [
            self.calib.HistogramCalibrator(q.spec.bits, None, q.unsigned) for q in self.subject.activations
        ]
        self.subject.visit(lambda i, x: self.histograms[i].collect(x))

    def weight_ranges(self) -> None:
        """Per-channel ranges of all weights by its MaxCalibrator."""
        for layer in weight_layers(self.subject.model):
            calibrator = self.calib.MaxCalibrator(layer.weight_quantizer.spec.bits, 0, False)
            calibrator.collect(layer.output_first(layer.weight.detach()))
            calibrator.compute_amax()
