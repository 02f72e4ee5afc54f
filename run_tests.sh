#!/usr/bin/env bash
# ./run_tests.sh [PYTEST ARGUMENTS]
#
# Runs the whole suite, or what the arguments choose: `-m gpu`, `tests/unit_tests`, `-k name`. All arguments go to pytest.
# The whole suite runs in two processes of one thread each (pytest-xdist): unit tests, then those that start ranks or runs.
# On first use it installs the requirements into .venv, unless the active Python has them. PYTHON=path uses that
# interpreter as it is.
set -u
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$ROOT/ensure_env.sh"
ensure_env || exit 1

export HF_HUB_OFFLINE=1    # a test that needs the network fails at once instead of waiting
cd "$ROOT" || exit 1
[ $# -gt 0 ] && exec "$PYTHON" -m pytest "$@"
export OMP_NUM_THREADS=1
"$PYTHON" -m pytest -n 2 tests/unit_tests
unit=$?
"$PYTHON" -m pytest -n 2 --dist worksteal tests/distributed_tests tests/integration_tests tests/gpu_tests
rest=$?
[ $unit -eq 0 ] && [ $rest -eq 0 ]
