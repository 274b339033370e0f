"""The peer: pytorch-quantization's own calibrators, which see the same tensors in the same run."""

from typing import List

from q3d_plugin.benchmark.subject import Subject, weight_layers

__all__ = ['Peer']


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
