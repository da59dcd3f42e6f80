#!/usr/bin/env bash
# Measure the figures of MODEL_CARD.md again as a user would: run_local.sh answers the images of split
# `test`, and training.evaluate measures its landmarks.csv.
#   ./test/run_real.sh [PSFHS_DIR]     default $AOP_DATA/psfhs or ../shared/data/psfhs
# Fails if a figure is more than a tenth worse than the card's. Needs the environment of run_tests.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-${AOP_DATA:-../shared/data}/psfhs}
[ -f "$data/cases.csv" ] || { echo "no cases.csv in $data; pass the folder of PSFHS" >&2; exit 2; }
python=${AOP_VENV:-$PWD/.venv-test}/bin/python
[ -x "$python" ] || { echo "no $python; run ./test/run_tests.sh first: it makes the environment" >&2; exit 2; }
images=$(mktemp -d)
trap 'rm -rf "$images"' EXIT
chmod 755 "$images"
"$python" - "$data" "$images" <<'PY'
import shutil, sys
from pathlib import Path
from training.data.case_table import read_cases
data, images = map(Path, sys.argv[1:])
for case in read_cases(data / "cases.csv"):
    if case.split == "test":
        shutil.copy(data / "images" / case.file, images)
PY
time ./test/run_local.sh "$images" >"$images.log" 2>&1 || { tail -20 "$images.log" >&2; exit 1; }
tail -3 "$images.log"
"$python" -m training.evaluate --data "$data/cases.csv" --split test --images "$data/images" \
  --predictions test/output/landmarks.csv --output test/output/figures.json
"$python" test/container/gate.py test/output/figures.json model/weights/MODEL_CARD.md
