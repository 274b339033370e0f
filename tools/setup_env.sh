#!/usr/bin/env bash
# Makes .venv from the pinned requirements, once; called by demo.sh and check.sh, and harmless to call again.
#
#   bash tools/setup_env.sh             .venv, with the versions of requirements/dev.txt
#   bash tools/setup_env.sh --oldest    .venv-oldest, with the lowest supported ones (requirements/oldest.txt);
#                                       several gigabytes where pip finds no CPU build of torch
#
#   PYTHON          the interpreter to build it from (default: python3)
#   Q3D_CACHE       where the mmcv wheels are kept between checkouts (default: ~/.cache/q3d_plugin)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
pinned="$root/requirements/dev.txt"
build_pinned="$root/requirements/build.txt"
if [ "${1:-}" = --oldest ]; then
    venv="$root/.venv-oldest"
    pinned="$root/requirements/oldest.txt"
    build_pinned="$root/requirements/oldest-build.txt"
elif [ $# -gt 0 ]; then
    echo "setup: '$1' is not known; --oldest or nothing would work" >&2
    exit 2
fi
cache="${Q3D_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/q3d_plugin}"
python="${PYTHON:-python3}"
mkdir -p "$cache"

# demo.sh and check.sh may start at the same time: one of them sets up, the other waits for it.
exec 9>"$cache/setup.lock"
flock 9

stamp=$(cat "$build_pinned" "$pinned" "${BASH_SOURCE[0]}" "$root/pyproject.toml" "$root/setup.py" | sha256sum | cut -d' ' -f1)
if [ -f "$venv/q3d-stamp" ] && [ "$(cat "$venv/q3d-stamp")" = "$stamp" ]; then
    exit 0
fi

echo "== setting up $venv"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"
$pip install --quiet -r "$build_pinned"

# mmcv 2.1.0 has no wheel for this torch. It is compiled once a machine (about 6 minutes) and kept in the cache,
# in a folder named after the interpreter and the torch it was compiled against. Pip's own cache knows nothing of
# that torch: --no-cache-dir, or it may hand out a wheel that was compiled against another one.
tag=$("$venv/bin/python" -c 'import sys, torch; print(f"cp{sys.version_info[0]}{sys.version_info[1]}-torch{torch.__version__}")')
wheels="$cache/wheels/$tag"
if ! ls "$wheels"/mmcv-2.1.0-*.whl >/dev/null 2>&1; then
    command -v g++ >/dev/null || { echo 'setup: compiling mmcv needs a C++ compiler (g++)' >&2; exit 1; }
    echo "== compiling mmcv 2.1.0 (about 6 minutes, once a machine; log in $cache/mmcv-build.log)"
    build=$(mktemp -d)
    trap 'rm -rf "$build"' EXIT
    if ! PATH="$venv/bin:$PATH" MMCV_WITH_OPS=1 FORCE_CUDA=0 MAX_JOBS=$(nproc) $pip wheel --verbose \
        --no-cache-dir --no-build-isolation --no-deps --wheel-dir "$build" mmcv==2.1.0 >"$cache/mmcv-build.log" 2>&1; then
        tail -n 30 "$cache/mmcv-build.log" >&2
        exit 1
    fi
    mkdir -p "$wheels"
    mv "$build"/mmcv-2.1.0-*.whl "$wheels/"
fi

echo "== installing the pinned requirements"
# By its path, and again where it is there: an mmcv 2.1.0 that stands in an older .venv may be that of another torch.
$pip install --quiet --no-deps --force-reinstall "$wheels"/mmcv-2.1.0-*.whl
$pip install --quiet -r "$pinned"
$pip install --quiet --no-deps --no-build-isolation --editable "$root"
if ! "$venv/bin/python" -c 'import mmcv.ops' 2>"$cache/mmcv-import.log"; then
    tail -n 5 "$cache/mmcv-import.log" >&2
    rm -f "$wheels"/mmcv-2.1.0-*.whl
    echo "setup: the mmcv wheel of $wheels does not fit this torch and was deleted; the next call compiles another" >&2
    exit 1
fi
echo "$stamp" >"$venv/q3d-stamp"
