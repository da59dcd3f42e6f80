#!/usr/bin/env bash
# Run the shipped model on a folder of images and check the answers.
#   ./test/run_local.sh              synthetic sample images; the answers must be the recorded ones
#   ./test/run_local.sh INPUT_DIR    your images (or a grand-challenge job)
# With a Docker engine: in the image, under the flags of a challenge platform. Without: in a virtual
# environment (.venv). RUNTIME=cpu|cuda chooses the variant (cuda where there is a GPU).
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
input=${1:-$top/test/cases/input}
[ -d "$input" ] || { echo "no folder $input; expected a folder of images" >&2; exit 2; }
input=$(cd "$input" && pwd -P)
cd "$top"
output=$PWD/test/output
gpu=(); runtime=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  gpu=(--gpus all); runtime=cuda
fi
runtime=${RUNTIME:-$runtime}
[ "$runtime" = cuda ] || gpu=()
rm -rf "$output"; mkdir -p "$output"; chmod 777 "$output"

as=()  # the image's own user, or whoever calls, so that the answers can be deleted again
[ "$(id -u)" = 0 ] || as=(--user "$(id -u):$(id -g)")

if docker info >/dev/null 2>&1; then
  docker build --build-arg RUNTIME="$runtime" -t aop:"$runtime" .
  strict=(--rm "${gpu[@]}" "${as[@]}" --network none --cap-drop ALL --security-opt no-new-privileges
    --read-only --tmpfs /tmp --pids-limit 256 --memory 4g --shm-size 128m)
  run=(docker run "${strict[@]}" -v "$input":/input:ro -v "$output":/output aop:"$runtime")
  check=(docker run "${strict[@]}" -v "$PWD/test":/test:ro --entrypoint python aop:"$runtime"
    /test/check_answers.py /test/output)
  expected=/test/cases/expected.csv
else
  python3 -m venv .venv
  requirements=$(cat requirements.txt)
  [ "$runtime" = cpu ] || requirements=${requirements/onnxruntime==/onnxruntime-gpu[cuda,cudnn]==}
  .venv/bin/pip install -q -r <(echo "$requirements")
  run=(.venv/bin/python process.py --input "$input" --output "$output")
  check=(.venv/bin/python test/check_answers.py "$output")
  expected=test/cases/expected.csv
fi
status=0
"${run[@]}" || status=$?
[ $# -gt 0 ] || check+=(--expected "$expected")
[ ! -e "$output/results.json" ] || "${check[@]}" || status=1
echo "answers and overlays: $output"
exit "$status"
