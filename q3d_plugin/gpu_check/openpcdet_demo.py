"""OpenPCDet's toy detector in float and W8A8, by its own evaluation.

    q3d toy-data --out DATA --infos openpcdet
    python -m q3d_plugin.gpu_check.openpcdet_demo DATA OUT.json

It needs OPENPCDET_ROOT; on CUDA that checkout has to be built. On a CPU it makes the file to compare with.
"""

import sys
from pathlib import Path
from typing import Any, Dict

from q3d_plugin import files
from q3d_plugin.analysis.opening import open_bench
from q3d_plugin.recipe import Recipe

__all__ = ['evaluate', 'main']

NAME = 'toy_centerpoint_voxel'


def evaluate(data: Path) -> Dict[str, Dict[str, Any]]:
    """mAP of the float and of the quantized detector, by OpenPCDet's own evaluation.

    Args:
        data: The toy data set, with OpenPCDet's info files.
    """
    options = {'DATA_CONFIG.DATA_PATH': str(data)}
    bench = open_bench(f'openpcdet/{NAME}_w8a8.yaml', f'openpcdet/{NAME}.pth', options)
    quantized, found = bench.recipe, {}
    for name, changes in (('float', {'mode': 'float'}), ('W8A8', {})):
        bench.prepare(Recipe.from_dict({**quantized.to_dict(), **changes}))
        found[f'OpenPCDet, {name}'] = {'mAP': bench.evaluate()['mAP']}
    return found


def main() -> int:
    """Evaluates on the data that the first argument names, and writes the file that the second one names."""
    files.write_json(Path(sys.argv[2]), evaluate(Path(sys.argv[1]).absolute()))
    return 0


if __name__ == '__main__':
    sys.exit(main())
