#!/usr/bin/env bash
# Run the shipped model as a challenge platform would, and check the answers.
#   ./test/run_local.sh              drawn images in every layout and mode; prints a table of checks
#   ./test/run_local.sh INPUT_DIR    your images (or a grand-challenge job)
# The answers lie in test/output, which is emptied first. The output of failed checks follows the
# table. With a Docker engine the script builds the image `aop` and runs it under the flags of a
# challenge platform. Without one it runs process.py in a virtual environment (.venv). RUNTIME=cpu|cuda
# chooses the variant; the default is cuda on a machine with a GPU, else cpu.
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
input=${1:-$top/test/cases/input}
[ -d "$input" ] || { echo "no folder $input; expected a folder of images" >&2; exit 2; }
input=$(cd "$input" && pwd -P)
cd "$top"
gpu=(); runtime=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  gpu=(--gpus all); runtime=cuda
fi
runtime=${RUNTIME:-$runtime}
[ "$runtime" = cuda ] || gpu=()
expected=test/cases/expected.int8.csv  # answers of aop.int8.onnx, which the CPU runs
[ ${#gpu[@]} = 0 ] || expected=test/cases/expected.csv  # answers of aop.onnx
image=aop
output=$PWD/test/output
rm -rf "$output"; mkdir -p "$output"; chmod 777 "$output"
work=$(mktemp -d); chmod 755 "$work"
server=aop-server-$$; docker=
trap 'rm -rf "$work"; [ -z "$docker" ] || docker rm -f "$server" >/dev/null 2>&1 || true' EXIT

as=()  # run as the caller, who can then delete the answers; root leaves the image's own user
[ "$(id -u)" = 0 ] || as=(--user "$(id -u):$(id -g)")

quietly() {  # COMMAND...: run it, and show its output only if it fails
  "$@" >"$work/log" 2>&1 || { local status=$?; cat "$work/log" >&2; return "$status"; }
}

if docker info >/dev/null 2>&1; then
  docker=yes
  echo "building the image $image for RUNTIME=$runtime (minutes the first time)"
  quietly docker build --build-arg RUNTIME="$runtime" -t "$image" .
  strict=("${gpu[@]}" "${as[@]}" --network none --cap-drop ALL --security-opt no-new-privileges
    --read-only --tmpfs /tmp --pids-limit 256 --memory 4g --shm-size 128m)
else
  python3 -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' ||
    { echo "without Docker this needs python3 of 3.11 or newer; found $(python3 --version)" >&2; exit 2; }
  echo "no Docker engine: installing into .venv (a minute the first time)"
  python3 -m venv .venv
  cp requirements.txt "$work"
  [ "$runtime" = cpu ] ||
    sed -i 's/^onnxruntime==/onnxruntime-gpu[cuda,cudnn]==/' "$work/requirements.txt"
  quietly .venv/bin/pip install -r "$work/requirements.txt"
fi

run() {  # INPUT OUTPUT [option ...]
  local in=$1 out=$2; shift 2
  if [ "$docker" ]; then
    docker run --rm "${strict[@]}" -v "$in":/input:ro -v "$out":/output "$image" "$@"
  else
    .venv/bin/python process.py --input "$in" --output "$out" "$@"
  fi
}
run_linked() {  # INPUT OUTPUT: run with a symbolic link as input folder
  if [ "$docker" ]; then
    docker run --rm "${strict[@]}" -v "$1":/mnt:ro -v "$2":/output --entrypoint sh "$image" \
      -c 'ln -s /mnt /tmp/input && exec python /opt/app/process.py --input /tmp/input'
  else
    ln -sfn "$1" "$work/link"; run "$work/link" "$2"
  fi
}
python() {  # [argument ...]: Python in the image, with test/ mounted, or in .venv
  if [ "$docker" ]; then
    docker run --rm "${strict[@]}" -v "$PWD/test":/test:ro -v "$output":/output --entrypoint python \
      -w / "$image" "$@"
  else
    .venv/bin/python "$@"
  fi
}
check() {  # NAME [option ...]: check the answers in $output/NAME
  local name=$1; shift
  if [ "$docker" ]; then python test/container/check_answers.py "/output/$name" "$@"
  else python test/container/check_answers.py "$output/$name" "$@"; fi
}

if [ $# -gt 0 ]; then
  status=0
  run "$input" "$output" || status=$?
  [ ! -e "$output/results.json" ] || quietly check . || status=1
  echo "answers and overlays: $output"
  exit "$status"
fi

# ---- Every layout and mode, on the synthetic images

make_job() {  # FOLDER KEY IMAGE: write a grand-challenge job whose entries have this key
  mkdir -p "$1/images/ultrasound"
  cp "$3" "$1/images/ultrasound/"
  printf '[{"%s": {"slug": "site", "super_kind": "Value"}, "value": 3},
    {"%s": {"slug": "ultrasound", "relative_path": "images/ultrasound", "super_kind": "Image"}}]' \
    "$2" "$2" >"$1/inputs.json"
}
ask() {  # METHOD PATH STATUS: send a request to the server; fail unless it answers with STATUS
  if [ "$docker" ]; then docker exec -i "$server" python - "$@" <test/container/ask.py
  else .venv/bin/python test/container/ask.py "$@"; fi
}
serve_jobs() {  # start a server, ask for its health, run good and bad jobs, stop it
  mkdir -p "$work/serve"; mkdir -m 777 -p "$output/invoke"
  if [ "$docker" ]; then
    docker run -d --name "$server" "${strict[@]}" -v "$work/serve":/input:ro \
      -v "$output/invoke":/output "$image" --serve
  else
    .venv/bin/python process.py --serve --input "$work/serve" --output "$output/invoke" & server=$!
    trap 'kill "$server" 2>/dev/null || true' EXIT
  fi
  ask GET /health 200
  ask POST /invoke 500  # there is no job yet
  cp -R "$work/socket/." "$work/serve"
  ask POST /invoke 201
  check invoke --expected "$expected" --some
  echo "{" >"$work/serve/inputs.json"
  ask POST /invoke 500
  ask GET /health 200
  if [ "$docker" ]; then
    docker stop "$server"; docker logs "$server"
    [ "$(docker inspect -f '{{.State.ExitCode}}' "$server")" = 0 ]
  else
    kill -TERM "$server"; wait "$server"
  fi
}
exec_and_check() {  # NAME INPUT [option of check ...]: run once and check the answers
  local name=$1 in=$2; shift 2
  mkdir -m 777 "$output/$name"
  "${how:-run}" "$in" "$output/$name"
  check "$name" --expected "$expected" "$@"
}

status=0
row() {  # WORDS COMMAND...: run the command and print a row of the table
  local words=$1 result=ok log=$work/row.log; shift
  set +e  # with "||" bash would not stop at the first command that fails
  ( set -e; "$@" ) >"$log" 2>&1
  [ $? = 0 ] || { result=FAILED; status=1; sed "s|^|[$words] |" "$log" >>"$work/failures"; }
  set -e
  printf '%-44s %s\n' "$words" "$result"
}
echo "answers to drawn images, checked against $expected (they say nothing of accuracy):"
images=(test/cases/input/*.png)
make_job "$work/socket" socket "${images[0]}"
make_job "$work/interface" interface "${images[1]}"
mkdir -p "$work/slug/images/pelvic-2d-ultrasound"
cp "${images[@]}" "$work/slug/images/pelvic-2d-ultrasound"
row "exec    a folder of images" exec_and_check folder "$input"
row "exec    images/<slug>/" exec_and_check slug "$work/slug"
row "exec    inputs.json with socket" exec_and_check socket "$work/socket" --some
row "exec    inputs.json with interface" exec_and_check interface "$work/interface" --some
how=run_linked row "exec    the input folder is a link" exec_and_check linked "$work/socket" --some
row "invoke  health, jobs good and bad, SIGTERM" serve_jobs
[ "$status" = 0 ] || cat "$work/failures" >&2
echo "answers and overlays: $output"
exit "$status"
