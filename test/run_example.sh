#!/usr/bin/env bash
# Runs the worked example of README.md as it stands there, in a copy of the repository; the lines
# from `docker` on only where an engine runs.
set -euo pipefail
cd "$(dirname "$0")/.."
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z | xargs -0 cp --parents -t "$copy"
lines=$(sed -n '/run_example.sh/,/^- \*\*Your images/p' README.md | sed -n 's/^    //p')
docker info >/dev/null 2>&1 || lines=${lines%%$'\n'docker build*}
[ "$(wc -l <<<"$lines")" -ge 15 ] || { echo "README.md's example was not found" >&2; exit 1; }
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
