#!/usr/bin/env bash
# Lints the code and runs the tests. Sets .venv up on the first call.
#
#   bash tools/check.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
bin=$PWD/.venv/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
exec "$bin/python" -m pytest "$@"
