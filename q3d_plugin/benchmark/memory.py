"""Peak memory of the passes, each in a fresh process, which is ``python -m q3d_plugin.benchmark.memory``."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Tuple

import torch
from tqdm import tqdm

from q3d_plugin import lifecycle
from q3d_plugin.benchmark.rows import FLOAT, INT8, STATISTICS, Row
from q3d_plugin.benchmark.subject import Subject, build_model, open_config
from q3d_plugin.calibration import collect
from q3d_plugin.errors import Q3DError
from q3d_plugin.files import write_json
from q3d_plugin.layers.model import switched

__all__ = ['MEMORY_TARGET', 'MODES', 'measure_memory', 'memory_of']

MEMORY_TARGET = 1.3
MODES = ('float', 'statistics', 'int8')


def peak_memory() -> Tuple[int, int]:
    """Present and largest resident memory of this process, in bytes."""
    try:
        lines = Path('/proc/self/status').read_text().splitlines()
        found = {line.split(':')[0]: line.split()[1] for line in lines if line.startswith(('VmHWM', 'VmRSS'))}
        # getrusage would be at least the memory of the parent at the time of the fork.
        return int(found['VmRSS']) * 1024, int(found['VmHWM']) * 1024
    except (OSError, KeyError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == 'darwin' else 1024
        return peak, peak


def memory_of(mode: str, config_path: str, folder: Path) -> Dict[str, int]:
    """Memory that a forward pass of ``mode`` needs, in this process, which has to be a fresh one.

    Args:
        mode: One of :data:`MODES`.
        config_path: The config.
        folder: Where :func:`measure_memory` put weights and frame.

    Returns:
        dict: Bytes: ``before`` the pass, and at its ``peak``.
    """
    adapter, config, recipe = open_config(config_path)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    model = build_model(adapter, config, recipe, mode != 'float', device)
    name = 'float.pth' if mode == 'float' else 'quantized.pth'
    model.load_state_dict(torch.load(folder / name, map_location=device))
    # A frame holds objects of the framework. The file was written by this very program.
    inputs = torch.load(folder / 'inputs.pth', map_location=device, weights_only=False)
    forward = adapter.forward_of(model)
    quantizers = lifecycle.quantizers(model)
    weights = [q for q in quantizers if q.per_channel]
    activations = [q for q in quantizers if not q.per_channel]
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        # Linux only: from here on counts the peak, not what building the model took.
        with contextlib.suppress(OSError):
            Path('/proc/self/clear_refs').write_text('5')
        before = peak_memory()[0]
    # Twice: the second pass meets the memory that the first one gave back.
    for _ in range(2):
        if mode == 'statistics':
            with switched(weights, False):
                collect(model, [inputs], forward, activations)
        else:
            with torch.no_grad():
                forward(inputs)
    peak = torch.cuda.max_memory_allocated(device) if device.type == 'cuda' else peak_memory()[1]
    return {'before': before, 'peak': peak}


def _in_fresh_process(mode: str, config_path: str, folder: str) -> Dict[str, int]:
    """:func:`memory_of` in a fresh process with as many threads as this one."""
    command = [sys.executable, '-m', 'q3d_plugin.benchmark.memory', mode, config_path, folder]
    # glibc keeps freed blocks of up to 32 MiB, in other places each time: the same mode would differ by
    # 80 MiB from run to run.
    environment = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': str(2**20)}
    done = subprocess.run(
        [*command, str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ['no message'])[-1]
        raise Q3DError(f'memory of {mode}: the process ended with {done.returncode}: {last}')
    return json.loads((Path(folder) / f'{mode}.json').read_text())


def measure_memory(subject: Subject, bar: tqdm) -> List[Row]:
    """Peak memory of the passes, each in a fresh process.

    Args:
        subject: Whose config, weights, ranges and frame are used.
        bar: Progress.

    Raises:
        Q3DError: A process failed.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(subject.float_model.state_dict(), Path(folder) / 'float.pth')
        torch.save(subject.model.state_dict(), Path(folder) / 'quantized.pth')
        torch.save(subject.inputs, Path(folder) / 'inputs.pth')
        for mode in MODES:
            bar.set_postfix_str(f'memory of {mode}', refresh=False)
            found[mode] = _in_fresh_process(mode, subject.path, folder)
            bar.update()
    rows = []
    for title, measure in (
        ('the process', lambda m: m['peak']),
        ('the forward pass', lambda m: m['peak'] - m['before']),
    ):
        reference = measure(found['float'])
        for mode, name in zip(MODES, (FLOAT, STATISTICS, INT8)):
            value, target = measure(found[mode]), None if mode == 'float' else MEMORY_TARGET
            ratio = value / reference if reference else None
            rows.append(Row('memory', f'{title}: {name}', value / 2**20, 'MiB', ratio, target=target))
    return rows


def main(mode: str, config_path: str, folder: str, threads: str) -> None:
    """The fresh process: measures one mode and writes ``MODE.json`` into the folder."""
    torch.set_num_threads(int(threads))
    write_json(Path(folder) / f'{mode}.json', memory_of(mode, config_path, Path(folder)))


if __name__ == '__main__':
    main(*sys.argv[1:])
