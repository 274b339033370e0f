#!/usr/bin/env bash
# The study's experiments: on the toy nuScenes, or with CONFIG CHECKPOINT on your own detector and data.
# The same as "q3d study" (see its --help), in the environment of this checkout.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/tools/setup_env.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
[ $# -gt 0 ] || cd "$root"
exec "$root/.venv/bin/python" -m q3d_plugin study "$@"
