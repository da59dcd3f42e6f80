#!/usr/bin/env bash
# Save the two files for grand-challenge: the image, and model.tar.gz, which the platform unpacks to
# /opt/ml/model. The image holds the weights too; model.tar.gz is for weights that change without it.
# Then check both: load the saved image, mount the weights and answer a sample image.
#   ./test/save.sh [FOLDER] [MODEL.onnx]      default: dist and the shipped model for CUDA or the CPU
# RUNTIME=cuda|cpu and API_METHOD=exec|invoke choose the image (default: cuda, exec). LANDMARKS_FILE,
# ANGLE_FILE, THREE_POINTS_FILE and FRAME_OF_ANSWERS set names and frame of the answers. Needs Docker.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-dist}
shipped=aop.onnx; [ "${RUNTIME:-cuda}" = cuda ] || shipped=aop.int8.onnx
model=${2:-model/weights/$shipped}
[ -f "$model" ] || { echo "no file $model; expected an ONNX model" >&2; exit 2; }
docker info >/dev/null 2>&1 || { echo "no Docker engine runs; start one first" >&2; exit 2; }
mkdir -p "$folder"
api=${API_METHOD:-exec}
image=$folder/aop-${RUNTIME:-cuda}-$api.tar.gz
tag=aop:${RUNTIME:-cuda}-$api
work=$(mktemp -d); chmod 755 "$work"
server=aop-saved-$$
trap 'rm -rf "$work"; docker rm -f "$server" >/dev/null 2>&1 || true' EXIT

arguments=()
for name in RUNTIME API_METHOD LANDMARKS_FILE ANGLE_FILE THREE_POINTS_FILE FRAME_OF_ANSWERS; do
  [ -z "${!name:-}" ] || arguments+=(--build-arg "$name=${!name}")
done
docker build "${arguments[@]}" -t "$tag" .
docker save "$tag" | gzip >"$folder/.image.partial"
mv "$folder/.image.partial" "$image"
tar -czf "$folder/model.tar.gz" -C "$(dirname "$model")" "$(basename "$model")"

docker rmi "$tag" >/dev/null
docker load <"$image"
mkdir -p "$work/model" "$work/in/images/ultrasound"; mkdir -m 777 "$work/out"
tar -xzf "$folder/model.tar.gz" -C "$work/model"
cp test/cases/input/phantom-61.png "$work/in/images/ultrasound"
echo '[{"socket": {"slug": "ultrasound", "relative_path": "images/ultrasound",
  "super_kind": "Image"}}]' >"$work/in/inputs.json"
chmod -R a+rX "$work"
as=()  # run as the caller, who can then delete the answers; root leaves the image's own user
[ "$(id -u)" = 0 ] || as=(--user "$(id -u):$(id -g)")
docker run -d --name "$server" "${as[@]}" --network none --cap-drop ALL --read-only --tmpfs /tmp \
  --security-opt no-new-privileges --pids-limit 256 --memory 4g --shm-size 128m \
  -v "$work/model":/opt/ml/model:ro -v "$work/in":/input:ro -v "$work/out":/output "$tag" >/dev/null
if [ "$api" = invoke ]; then
  docker exec -i "$server" python - GET /health 200 <test/container/ask.py
  docker exec -i "$server" python - POST /invoke 201 <test/container/ask.py
  docker stop "$server" >/dev/null
fi
[ "$(docker wait "$server")" = 0 ] || { docker logs "$server" >&2; exit 1; }
docker logs "$server" | tee "$work/log"
grep -q '(/opt/ml/model/' "$work/log" || { echo "the mounted weights were not used" >&2; exit 1; }
for name in "${LANDMARKS_FILE:-aop-landmarks.json}" "${ANGLE_FILE:-angle-of-progression.json}"; do
  [ -s "$work/out/$name" ] || { echo "no answer $name" >&2; exit 1; }
done
ls -lh "$image" "$folder/model.tar.gz"
