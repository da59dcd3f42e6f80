#!/usr/bin/env bash
# Write model/locks/cpu.txt and cuda.txt from requirements.txt: every package of the image with its
# version and the digest of its wheel. Run it on Linux on x86-64 with Python 3.11, as in the image.
#   ./test/lock.sh       after a change of requirements.txt
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
for runtime in cpu cuda; do
  cp requirements.txt "$work/$runtime.txt"
  [ "$runtime" = cpu ] || sed -i 's/^onnxruntime==/onnxruntime-gpu[cuda,cudnn]==/' "$work/$runtime.txt"
  "$work/venv/bin/pip" install -q --dry-run --report "$work/report.json" -r "$work/$runtime.txt"
  "$work/venv/bin/python" - "$work/report.json" >"model/locks/$runtime.txt" <<'PY'
import json, sys
print("# Written by test/lock.sh from requirements.txt; the Dockerfile installs it.")
lines = []
for package in json.load(open(sys.argv[1]))["install"]:
    about, digest = package["metadata"], package["download_info"]["archive_info"]["hashes"]["sha256"]
    lines.append(f"{about['name'].lower()}=={about['version']} --hash=sha256:{digest}")
print("\n".join(sorted(lines)))
PY
done
wc -l model/locks/*.txt
