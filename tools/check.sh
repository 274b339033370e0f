#!/usr/bin/env bash
# Lints the code and runs the tests, in random order. Sets .venv up on the first call.
#
#   bash tools/check.sh [options] [arguments of pytest]
#
#   --oldest                                    with the lowest supported versions, in .venv-oldest; no linting
#   --upstream OPENPCDET_ROOT MMDET3D_ROOT      also tests/upstream, against these source checkouts; "-": none
#   --random-order-seed=N                       (of pytest) in the order of an earlier run, which printed N
#   --random-order-bucket=none                  (of pytest) in the order of the files
set -euo pipefail
oldest=
while :; do
    case ${1:-} in
        --oldest)
            oldest=--oldest
            ;;
        --upstream)
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
            ;;
        *) break ;;
    esac
    shift
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh $oldest
bin=$PWD/.venv${oldest:+-oldest}/bin
if [[ -z $oldest ]]; then
    "$bin/ruff" check .
    "$bin/ruff" format --check .
fi
seed=$RANDOM
echo "== tests in random order; the same order again: --random-order-seed=$seed"
exec "$bin/python" -m pytest --random-order --random-order-seed="$seed" "$@"
