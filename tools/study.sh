#!/usr/bin/env bash
# The study's experiments, one after the other, and one table of them.
#
#     bash tools/study.sh                                  on the toy nuScenes (about an hour a framework)
#     bash tools/study.sh CONFIG CHECKPOINT [options]      on your own: options are those of tools/sweep.py
#
# OpenPCDet's part runs where OPENPCDET_ROOT names a checkout. What was interrupted goes on where it stopped.
set -euo pipefail
if [ $# -gt 0 ]; then
    [ $# -ge 2 ] || { echo 'study.sh: give CONFIG and CHECKPOINT, or nothing for the toy' >&2; exit 2; }
    set -- "$(realpath -m "$1")" "$(realpath -m "$2")" "${@:3}"
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
python=.venv/bin/python
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if [ $# -gt 0 ]; then
    case "$1" in *.py) framework=mmdet3d ;; *) framework=openpcdet ;; esac
    out=work_dirs/study/$(basename "${1%.*}")
    "$python" tools/sweep.py "$1" "$2" --grid "configs/$framework/study/recipes.py" --out "$out" "${@:3}"
    exec "$python" tools/study_table.py "$framework=$out"
fi

data=data/toy_nuscenes
[ -f "$data/v1.0-mini/sample.json" ] || "$python" tools/toy_nuscenes --out "$data"
[ -f "$data/nuscenes_infos_val.pkl" ] || "$python" tools/make_infos.py "$data"
toy=toy_centerpoint_voxel
"$python" tools/sweep.py "configs/mmdet3d/${toy}_w8a8.py" "configs/mmdet3d/$toy.pth" \
    --grid configs/mmdet3d/study/recipes.py --out work_dirs/study/mmdet3d
results=(MMDetection3D=work_dirs/study/mmdet3d)
if [ -n "${OPENPCDET_ROOT:-}" ]; then
    "$python" tools/make_openpcdet_infos.py "$data"
    "$python" tools/sweep.py "configs/openpcdet/${toy}_w8a8.yaml" "configs/openpcdet/$toy.pth" \
        --grid configs/openpcdet/study/recipes.py --set "DATA_CONFIG.DATA_PATH=$PWD/$data" --out work_dirs/study/openpcdet
    results+=(OpenPCDet=work_dirs/study/openpcdet)
else
    echo 'OPENPCDET_ROOT is not set: only MMDetection3D' >&2
fi
"$python" tools/study_table.py "${results[@]}"
