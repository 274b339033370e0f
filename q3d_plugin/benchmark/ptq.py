"""The part ``ptq``: post-training quantization, side by side with float and with pytorch-quantization."""

from typing import List

from tqdm import tqdm

from q3d_plugin.benchmark.memory import MODES, measure_memory
from q3d_plugin.benchmark.peer import Peer
from q3d_plugin.benchmark.ranges import PEER_METHODS, measure_error, measure_peer_ranges, measure_ranges
from q3d_plugin.benchmark.rows import Row
from q3d_plugin.benchmark.subject import Subject
from q3d_plugin.benchmark.timing import PASSES, measure_time
from q3d_plugin.recipe import CALIBRATORS

__all__ = ['NOTES', 'measure', 'steps']

NOTES = (
    'Timed is the forward pass from voxels to the raw outputs of the head; voxelization (but for BEVFusion '
    'of MMDetection3D, which does it in its forward pass), box decoding and NMS are outside.',
    'Ratios are medians of the ratios within a round; in each round every mode runs once, in turn.',
    "q3d's ranges take activations and weights by the named calibrator (entropy: weights by max). The peer's "
    'weights are taken by its MaxCalibrator, as its own examples do.',
    'The peer sees each shared tensor once, as q3d does; on its own it has one calibrator per layer.',
    'Error: squared error of all fake-quantized activations of this one frame over that with the max range; '
    'mean, least and largest of all tensors.',
    'Memory is that of a fresh process per mode, with weights, ranges and voxels read from a file; '
    'freed blocks above 1 MiB go back to the system at once.',
)


def steps(repeats: int) -> int:
    """Steps of the progress bar."""
    return PASSES * (repeats + 1) + len(CALIBRATORS) + len(PEER_METHODS) + len(MODES) + 1


def measure(subject: Subject, repeats: int, entropy_tensors: int, bar: tqdm) -> List[Row]:
    """Time of the passes, ranges, memory, and the error of the ranges.

    Args:
        subject: The models and the frame.
        repeats: Rounds that are timed.
        entropy_tensors: Activations that the peer's entropy is timed on.
        bar: Progress.
    """
    peer = Peer(subject)
    rows = measure_time(subject, peer, repeats, bar)
    found, ranges = measure_ranges(subject, bar)
    rows += found
    found, peer_ranges = measure_peer_ranges(peer, entropy_tensors, bar)
    rows += found
    rows += measure_memory(subject, bar)
    return rows + measure_error(subject, ranges, peer_ranges, bar)
