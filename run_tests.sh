#!/usr/bin/env bash
# ./run_tests.sh [PYTEST ARGUMENTS]
#
# Runs the whole suite, or what the arguments choose: `-m gpu`, `tests/unit_tests`, `-k name`. All arguments go to pytest;
# `-n 4` uses four processes (pytest-xdist).
# On first use it installs the requirements into .venv, unless the active Python has them. PYTHON=path uses that
# interpreter as it is.
set -u
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$ROOT/ensure_env.sh"
ensure_env || exit 1

export HF_HUB_OFFLINE=1    # a test that needs the network fails at once instead of waiting
cd "$ROOT" && exec "$PYTHON" -m pytest "$@"
