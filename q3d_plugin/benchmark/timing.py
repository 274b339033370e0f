"""Time of the forward passes."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Dict, List, NamedTuple, Optional

import torch
from tqdm import tqdm

from q3d_plugin.benchmark.peer import Peer
from q3d_plugin.benchmark.rows import FLOAT, FOLDED, INT8, PEER, STATISTICS, Row
from q3d_plugin.benchmark.subject import Subject

__all__ = [
    'INT8_TARGET',
    'PASSES',
    'STATISTICS_TARGET',
    'Pass',
    'measure_passes',
    'measure_time',
    'seconds',
]

STATISTICS_TARGET = {'cpu': 1.2, 'cuda': 1.2}
INT8_TARGET = {'cpu': 1.05, 'cuda': 1.25}
"""Upper bounds of the ratio to float, by kind of device."""
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


class Pass(NamedTuple):
    """Something that is timed.

    Attributes:
        function: Called once a round.
        reference: Name of the pass that its time is divided by.
        target: Upper bound of that ratio; None where there is none.
        note: What a reader has to know.
    """

    function: Callable[[], Any]
    reference: str
    target: Optional[float] = None
    note: str = ''


def measure_passes(
    section: str, passes: Mapping[str, Pass], repeats: int, device: torch.device, bar: tqdm
) -> List[Row]:
    """Times passes, interleaved: the speed of a machine drifts, and a ratio within a round does not.

    Args:
        section: Of the rows.
        passes: By name; each reference is among them.
        repeats: Number of rounds; one more comes first and is not counted.
        device: Where they run.
        bar: Progress.
    """
    times: Dict[str, List[float]] = {name: [] for name in passes}
    processor: Dict[str, List[float]] = {name: [] for name in passes}
    for number in range(repeats + 1):
        for name, one in passes.items():
            bar.set_postfix_str(name, refresh=False)
            start = time.process_time()
            taken = seconds(one.function, device)
            if number:
                times[name].append(taken)
                processor[name].append(time.process_time() - start)
            bar.update()
    rows = []
    for name, one in passes.items():
        ratios = [a / b for a, b in zip(times[name], times[one.reference])]
        spread = (min(ratios), max(ratios))
        value, ratio = statistics.median(times[name]), statistics.median(ratios)
        cpu_ratio = statistics.median(a / b for a, b in zip(processor[name], processor[one.reference]))
        rows.append(Row(section, name, value, 's', ratio, cpu_ratio, spread, one.target, note=one.note))
    return rows


def measure_time(subject: Subject, peer: Peer, repeats: int, bar: tqdm) -> List[Row]:
    """The forward passes.

    Args:
        subject: What to run.
        peer: What to compare with.
        repeats: Number of rounds.
        bar: Progress.
    """
    kind = subject.device.type
    passes = {
        FLOAT: Pass(subject.run_float, FLOAT),
        FOLDED: Pass(subject.run_folded, FLOAT, note='quantizers off'),
        STATISTICS: Pass(subject.run_statistics, FLOAT, STATISTICS_TARGET[kind]),
        INT8: Pass(subject.run_int8, FLOAT, INT8_TARGET[kind]),
        f'{PEER} max statistics': Pass(peer.run_max, FLOAT, note='peer'),
        f'{PEER} histogram statistics': Pass(peer.run_histogram, FLOAT, note='peer'),
    }
    return measure_passes('time', passes, repeats, subject.device, bar)
