#!/usr/bin/env bash
# Save the two files that grand-challenge takes: the image, and the weights, which it unpacks to
# /opt/ml/model. Then check them: the saved image is loaded and runs on the sample images, with the
# weights mounted.
#   ./test/save.sh [FOLDER] [MODEL.onnx]      default: dist and the shipped model
# RUNTIME=cuda|cpu and API_METHOD=exec|invoke choose the image (default: cuda, exec). Needs Docker.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-dist}
model=${2:-model/weights/aop.onnx}
[ -f "$model" ] || { echo "no model $model; expected an .onnx file" >&2; exit 2; }
mkdir -p "$folder"
tag=aop:saved-$$
work=$(mktemp -d); chmod 755 "$work"
trap 'rm -rf "$work"; docker rmi -f "$tag" >/dev/null 2>&1 || true' EXIT

docker build --build-arg RUNTIME="${RUNTIME:-cuda}" --build-arg API_METHOD="${API_METHOD:-exec}" -t "$tag" .
docker save "$tag" | gzip >"$folder/.image.partial"
mv "$folder/.image.partial" "$folder/aop.tar.gz"
tar -czf "$folder/model.tar.gz" -C "$(dirname "$model")" "$(basename "$model")"

docker rmi "$tag" >/dev/null
docker load <"$folder/aop.tar.gz"
mkdir "$work/model"; mkdir -m 777 "$work/out"
tar -xzf "$folder/model.tar.gz" -C "$work/model"
chmod -R a+rX "$work/model"
as=()  # the image's own user, or whoever calls, so that the answers can be deleted again
[ "$(id -u)" = 0 ] || as=(--user "$(id -u):$(id -g)")
docker run --rm "${as[@]}" --network none --cap-drop ALL --security-opt no-new-privileges --read-only \
  --tmpfs /tmp --pids-limit 256 --memory 4g --shm-size 128m -v "$work/model":/opt/ml/model:ro \
  -v "$PWD/test/cases/input":/input:ro -v "$work/out":/output "$tag" --api-method exec | tee "$work/log"
grep -q '(/opt/ml/model/' "$work/log" || { echo "the mounted weights were not used" >&2; exit 1; }
ls -lh "$folder/aop.tar.gz" "$folder/model.tar.gz"
