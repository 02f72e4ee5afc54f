#!/usr/bin/env bash
# ./run_tests.sh [PYTEST ARGUMENTS]    The whole suite, or what the arguments choose (`-m gpu`, `tests/unit_tests`, `-k name`).
# On first use it installs the requirements into .venv, unless the active Python has them. PYTHON=path uses that interpreter as it is.
set -u
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$ROOT/ensure_env.sh"
ensure_env || exit 1

export HF_HUB_OFFLINE=1    # a test that reaches for the network fails at once, instead of waiting for it
cd "$ROOT" && exec "$PYTHON" -m pytest "$@"
