#!/usr/bin/env bash
# Checks and measures everything that only CUDA shows, on a machine with an NVIDIA GPU, with or without a network.
#
#   bash tools/check_gpu.sh [--wheels DIR] [--part NAME ...] [--out DIR] [--cpu-summary FILE]
#   bash tools/check_gpu.sh --collect DIR --python 3.12 --cuda 12.6      on a machine with a network: fills DIR
#
#   PYTHON      the interpreter whose torch is used (default: python3)
#
# docs/gpu.md says what is checked.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m q3d_plugin check-gpu "$@"
