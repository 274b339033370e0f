"""Quantized modules. Importing this package registers every type of layer that is installed here."""

from q3d_plugin.layers import attention, dense
from q3d_plugin.layers.base import (
    REGISTRY,
    InputGroup,
    QuantUnit,
    QuantWeightLayer,
    converted,
    is_converted,
    why_not,
)
from q3d_plugin.layers.elementwise import QuantAdd, QuantConcat
from q3d_plugin.layers.matmul import QuantMatMul

try:
    from q3d_plugin.layers import sparse
except ImportError:  # a camera-only detector needs no spconv
    sparse = None

__all__ = [
    'InputGroup',
    'QuantAdd',
    'QuantConcat',
    'QuantMatMul',
    'QuantUnit',
    'QuantWeightLayer',
    'REGISTRY',
    'attention',
    'converted',
    'dense',
    'is_converted',
    'sparse',
    'why_not',
]
