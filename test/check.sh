#!/usr/bin/env bash
# The check before a commit: lint, types and the fast tests, in the environment of run_tests.sh.
# Arguments go to pytest.
set -euo pipefail
exec "$(dirname "$0")/run_tests.sh" -m "not slow and not browser and not docker and not real" "$@"
