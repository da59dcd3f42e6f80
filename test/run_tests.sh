#!/usr/bin/env bash
# The whole test suite from nothing: virtual environment, lint, types, tests.
# AOP_DATA names the folder that holds psfhs/ (default ../shared/data); without it, tests on real
# images are skipped. Arguments go to pytest.
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
