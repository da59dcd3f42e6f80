#!/usr/bin/env bash
# Check a change before a commit: lint, types and the fast tests, in the environment of run_tests.sh.
# Arguments go to pytest.
set -euo pipefail
export OMP_NUM_THREADS=1  # the tests' networks are small: a second thread costs more than it gives
exec "$(dirname "$0")/run_tests.sh" -m "not slow and not browser and not docker and not real" "$@"
