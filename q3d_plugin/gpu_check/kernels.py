"""Fake quantization alone on CUDA: ``python -m q3d_plugin.gpu_check.kernels OUT.json``.

The kernel that is used there, against the chain of operations that is used on the CPU, and against
pytorch-quantization, whose wheel has no compiled kernel: its operations in Python are what runs.
"""

import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Dict, List, Optional
from unittest import mock

import torch
from torch import Tensor

from q3d_plugin import files, kernel, numerics
from q3d_plugin.text import text_table

__all__ = ['fastest', 'main', 'rows_of', 'ways']

SIZES = {
    'neck, (1, 512, 180, 180)': (1, 512, 180, 180),
    'sparse features, (60000, 64)': (60_000, 64),
    'small, (1, 64, 90, 90)': (1, 64, 90, 90),
}
WEIGHT = (256, 256, 3, 3)


def fastest(function: Callable[[], Any], rounds: int = 30, inner: int = 10) -> float:
    """Microseconds of a call: the median over rounds of ``inner`` calls each, by events of the device."""
    for _ in range(5):
        function()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / inner)
    return statistics.median(times)


def ways(x: Tensor, amax: Tensor, axis: Optional[int]) -> Dict[str, Callable[[], Tensor]]:
    """Fake quantization to eight bits by name of the way.

    Args:
        x: What is quantized.
        amax: Its range, or its ranges.
        axis: The axis that has ranges of its own.
    """
    from pytorch_quantization.tensor_quant import fake_tensor_quant

    # The peer broadcasts its range.
    wide = amax if axis is None else amax.reshape([-1] + [1] * (x.dim() - 1))

    def chain() -> Tensor:
        with mock.patch.object(kernel, 'is_fast', lambda *_: False):
            return numerics.fake_quantize(x, amax, 8, axis=axis)

    return {
        'q3d': lambda: numerics.fake_quantize(x, amax, 8, axis=axis),
        'chain of operations': chain,
        'pytorch-quantization': lambda: fake_tensor_quant(x, wide, 8, False, False),
    }


def rows_of(name: str, times: Mapping[str, float]) -> List[Dict[str, Any]]:
    """Rows of one tensor; q3d passes where nothing else is faster, with a margin of five per cent.

    Args:
        name: Of the tensor.
        times: Microseconds by name of the way.
    """
    others = min(t for way, t in times.items() if way != 'q3d')
    rows = []
    for way, taken in times.items():
        row = {'name': f'{name}: {way}', 'microseconds': taken, 'ratio': taken / times['q3d']}
        rows.append({**row, 'passed': taken <= 1.05 * others if way == 'q3d' else None})
    return rows


@torch.no_grad()
def main() -> int:
    """Measures, prints a table and writes the file that the first argument names."""
    rows: List[Dict[str, Any]] = []
    for dtype in (torch.float32, torch.float16):
        for name, shape in SIZES.items():
            x = torch.randn(shape, device='cuda').to(dtype)
            measured = {way: fastest(f) for way, f in ways(x, x.abs().amax().float(), None).items()}
            rows += rows_of(f'{name} {str(dtype)[6:]}', measured)
    weight = torch.randn(WEIGHT, device='cuda')
    amax = weight.abs().amax((1, 2, 3))
    rows += rows_of('weight', {way: fastest(f) for way, f in ways(weight, amax, 0).items()})
    words = {None: '', True: 'pass', False: 'MISSED'}
    cells = [[r['name'], f'{r["microseconds"]:.1f}', f'{r["ratio"]:.2f}', words[r['passed']]] for r in rows]
    sys.stdout.write(text_table(['', 'us', 'of q3d', ''], cells, right=[1, 2]) + '\n')
    files.write_json(Path(sys.argv[1]), {'device': torch.cuda.get_device_name(), 'rows': rows})
    return 0


if __name__ == '__main__':
    sys.exit(main())
