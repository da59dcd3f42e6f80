"""Drive a Codabench bundle as an ingestion program does, for export.codabench's check of it.

    python codabench_check.py BUNDLE_FOLDER IMAGES.npz ANSWERS.npy

It runs in a process of its own, where neither this repository nor any package that an ingestion
program's environment may lack can be imported.
"""

import sys
from importlib import import_module

import numpy as np
from PIL import Image

ABSENT = (
    "SimpleITK", "cv2", "onnx", "onnxruntime", "pydantic", "safetensors", "torchvision", "tqdm",
    "export", "process", "training",
)  # fmt: skip


def main(bundle: str, images: str, answers: str) -> None:
    """Predict each (H, W, 3) image, and write the answers (n, 6)."""
    sys.path[0] = bundle  # instead of this file's folder
    for name in ABSENT:
        sys.modules[name] = None  # type: ignore[assignment]  # what makes its import fail
    network = import_module("model").model().load(bundle)
    with np.load(images) as pictures:
        found = [network.predict(Image.fromarray(pictures[name])) for name in pictures.files]
    np.save(answers, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
