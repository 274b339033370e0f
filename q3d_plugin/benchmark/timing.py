"""Time of the forward passes."""

import statistics
import time
from collections.abc import Callable
from typing import Dict, List

import torch
from tqdm import tqdm

from q3d_plugin.benchmark.peer import Peer
from q3d_plugin.benchmark.rows import FLOAT, FOLDED, INT8, PEER, STATISTICS, Row
from q3d_plugin.benchmark.subject import Subject

__all__ = ['INT8_TARGET', 'PASSES', 'STATISTICS_TARGET', 'measure_time', 'seconds']

STATISTICS_TARGET = 1.2
INT8_TARGET = 1.05
PASSES = 6
"""Passes that are timed in each round."""


def seconds(function: Callable, device: torch.device) -> float:
    """How long one call takes, with everything that it started on ``device``."""

    def synchronize() -> None:
        if device.type == 'cuda':
            torch.cuda.synchronize(device)

    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def measure_time(subject: Subject, peer: Peer, repeats: int, bar: tqdm) -> List[Row]:
    """The forward passes, interleaved: the speed of a machine drifts, and a ratio within a round does not.

    Args:
        subject: What to run.
        peer: What to compare with.
        repeats: Number of rounds; one more comes first and is not counted.
        bar: Progress.
    """
    modes = {
        FLOAT: (subject.run_float, None, ''),
        FOLDED: (subject.run_folded, None, 'quantizers off'),
        STATISTICS: (subject.run_statistics, STATISTICS_TARGET, ''),
        INT8: (subject.run_int8, INT8_TARGET, ''),
        f'{PEER} max statistics': (peer.run_max, None, 'peer'),
        f'{PEER} histogram statistics': (peer.run_histogram, None, 'peer'),
    }
    times: Dict[str, List[float]] = {name: [] for name in modes}
    processor: Dict[str, List[float]] = {name: [] for name in modes}
    for number in range(repeats + 1):
        for name, (function, _, _) in modes.items():
            bar.set_postfix_str(name, refresh=False)
            start = time.process_time()
            taken = seconds(function, subject.device)
            if number:
                times[name].append(taken)
                processor[name].append(time.process_time() - start)
            bar.update()
    rows = []
    for name, (_, target, note) in modes.items():
        ratios = [a / b for a, b in zip(times[name], times[FLOAT])]
        spread = (min(ratios), max(ratios))
        value, ratio = statistics.median(times[name]), statistics.median(ratios)
        cpu_ratio = statistics.median(a / b for a, b in zip(processor[name], processor[FLOAT]))
        rows.append(Row('time', name, value, 's', ratio, cpu_ratio, spread, target, note=note))
    return rows
