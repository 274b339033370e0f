#!/usr/bin/env bash
# Lints the code and runs the tests. Sets .venv up on the first call.
#
#   bash tools/check.sh [arguments of pytest]
#   bash tools/check.sh --upstream OPENPCDET_ROOT MMDET3D_ROOT [arguments of pytest]
#
# The second form also runs tests/upstream against these source checkouts; either may be "-".
set -euo pipefail
if [[ ${1:-} == --upstream ]]; then
    if (($# < 3)); then
        echo 'check.sh: --upstream takes OPENPCDET_ROOT and MMDET3D_ROOT; "-" stands for none' >&2
        exit 2
    fi
    for variable in OPENPCDET_ROOT MMDET3D_ROOT; do
        shift
        if [[ $1 != - ]]; then
            if [[ ! -d $1 ]]; then
                echo "check.sh: $variable: '$1' is not a folder" >&2
                exit 2
            fi
            export "$variable=$(cd "$1" && pwd)"
        fi
    done
    shift
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
bin=$PWD/.venv/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
exec "$bin/python" -m pytest "$@"
