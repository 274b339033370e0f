#!/usr/bin/env bash
# Builds the wheel, installs it with MMDetection3D into a fresh environment, and runs q3d in an empty folder.
#
#   bash tools/check_wheel.sh [FOLDER]
#
# FOLDER (default: a temporary one, removed at the end) gets the environment and the empty folder. The mmcv wheel that
# setup_env.sh compiled is used. A few minutes: everything else is downloaded.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/tools/setup_env.sh"
python="$root/.venv/bin/python"
if [ $# -gt 0 ]; then
    mkdir -p "$1"
    folder=$(cd "$1" && pwd)
else
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi

# Built from a copy, because building leaves folders behind.
mkdir -p "$folder/source" "$folder/empty"
cp -r "$root"/{pyproject.toml,setup.py,README.md,LICENSE,q3d_plugin,configs} "$folder/source/"
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder" "$folder/source"
torch=$("$python" -c 'import torch; print(torch.__version__)')
cache="${Q3D_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/q3d_plugin}"
wheels=$(ls -d "$cache"/wheels/*"torch$torch")
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --find-links "$wheels" "torch==$torch" \
    "$(ls "$folder"/q3d_plugin-*.whl)[mmdet3d,cpu]"

cd "$folder/empty"
q3d="$folder/venv/bin/q3d"
toy=mmdet3d/toy_centerpoint_voxel
"$q3d" --version
"$q3d" --help
"$q3d" toy-data --train-scenes 1 --val-scenes 1 --frames 4
"$q3d" test "${toy}_w8a8.py" "$toy.pth"
"$q3d" sensitivity "${toy}_w8a8.py" "$toy.pth" --frames 1 --local
echo 'check_wheel: passed'
