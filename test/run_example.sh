#!/usr/bin/env bash
# Runs the tutorial's commands of training/README.md as they stand there, in a copy of the repository;
# the lines from `docker` on only if a Docker engine runs.
set -euo pipefail
cd "$(dirname "$0")/.."
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z | xargs -0 cp --parents -t "$copy"
# the fenced block after the line that names this script
lines=$(sed -n '/run_example.sh/,/^```$/p' training/README.md | sed '1,/^```sh$/d;$d')
docker info >/dev/null 2>&1 || lines=${lines%%$'\n'docker build*}
[ "$(wc -l <<<"$lines")" -ge 15 ] || { echo "training/README.md's example was not found" >&2; exit 1; }
cd "$copy"
bash -euxc "$lines"
if [ -d demo/out ]; then
  python - demo/out/results.json <<'END'
import json, sys
cases = json.load(open(sys.argv[1]))["cases"]
assert len(cases) == 20 and all(case["expected_aop_error_deg"] for case in cases), cases[0]
END
fi
echo "the example ran"
