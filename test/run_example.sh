#!/usr/bin/env bash
# Run the commands of the tutorial in training/README.md as they stand there, in a copy of the
# repository. Without a Docker engine the lines from `docker build` on are left out.
set -euo pipefail
cd "$(dirname "$0")/.."
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z | xargs -0 cp --parents -t "$copy"
# the fenced block after the line that names this script
lines=$(sed -n '/run_example.sh/,/^```$/p' training/README.md | sed '1,/^```sh$/d;$d')
docker info >/dev/null 2>&1 || lines=${lines%%$'\n'docker build*}
[ "$(wc -l <<<"$lines")" -ge 15 ] || { echo "no example in training/README.md below run_example.sh" >&2; exit 1; }
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
