#!/usr/bin/env bash
# The main job on the toy nuScenes: float and W8A8 CenterPoint-Voxel by MMDetection3D's own evaluation.
# Sets .venv up on the first call.
#
#   bash tools/demo.sh [--seed N] [--data DIR] [--out DIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
exec .venv/bin/python tools/demo.py "$@"
