#!/usr/bin/env bash
# Make the virtual environment and run lint, types and all tests. Arguments go to pytest.
# AOP_DATA names the folder that holds psfhs/ (default ../shared/data). Tests on real images are
# skipped without it.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${AOP_VENV:-$PWD/.venv-test}  # an absolute path
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install -q -r test/requirements.txt
export PATH="$venv/bin:$PATH"
ruff check .
ruff format --check .
mypy
python -m pytest "$@"
