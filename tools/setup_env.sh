#!/usr/bin/env bash
# Makes .venv from the pinned requirements, once; called by demo.sh and check.sh, and harmless to call again.
#
#   PYTHON          the interpreter to build .venv from (default: python3)
#   Q3D_CACHE       where the mmcv wheel is kept between checkouts (default: ~/.cache/q3d_plugin)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
cache="${Q3D_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/q3d_plugin}"
python="${PYTHON:-python3}"
mkdir -p "$cache"

# demo.sh and check.sh may start at the same time: one of them sets up, the other waits for it.
exec 9>"$cache/setup.lock"
flock 9

stamp=$(cat "$root/requirements/build.txt" "$root/requirements/dev.txt" "${BASH_SOURCE[0]}" | sha256sum | cut -d' ' -f1)
if [ -f "$venv/q3d-stamp" ] && [ "$(cat "$venv/q3d-stamp")" = "$stamp" ]; then
    exit 0
fi

echo "== setting up $venv"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"
$pip install --quiet -r "$root/requirements/build.txt"

# mmcv 2.1.0 has no wheel for this torch. It is compiled once a machine (about 6 minutes) and kept in the cache,
# in a folder named after the interpreter and the torch it was compiled against.
tag=$("$venv/bin/python" -c 'import sys, torch; print(f"cp{sys.version_info[0]}{sys.version_info[1]}-torch{torch.__version__}")')
wheels="$cache/wheels/$tag"
if ! ls "$wheels"/mmcv-2.1.0-*.whl >/dev/null 2>&1; then
    command -v g++ >/dev/null || { echo 'setup: compiling mmcv needs a C++ compiler (g++)' >&2; exit 1; }
    echo "== compiling mmcv 2.1.0 (about 6 minutes, once a machine; log in $cache/mmcv-build.log)"
    build=$(mktemp -d)
    trap 'rm -rf "$build"' EXIT
    if ! PATH="$venv/bin:$PATH" MMCV_WITH_OPS=1 FORCE_CUDA=0 MAX_JOBS=$(nproc) $pip wheel --verbose \
        --no-build-isolation --no-deps --wheel-dir "$build" mmcv==2.1.0 >"$cache/mmcv-build.log" 2>&1; then
        tail -n 30 "$cache/mmcv-build.log" >&2
        exit 1
    fi
    mkdir -p "$wheels"
    mv "$build"/mmcv-2.1.0-*.whl "$wheels/"
fi

echo "== installing the pinned requirements"
$pip install --quiet --find-links "$wheels" -r "$root/requirements/dev.txt"
$pip install --quiet --no-deps --no-build-isolation --editable "$root"
echo "$stamp" >"$venv/q3d-stamp"
