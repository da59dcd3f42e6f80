"""The model that Codabench's ingestion program calls: model.py of the bundle.

    network = model().load("./")
    x1, y1, x2, y2, x3, y3 = network.predict(image)

It runs on the CPU and needs Python 3.9, torch 2.0, numpy and Pillow, or newer versions. It uses no
other package, even if one is installed. `python -m export.codabench` makes the bundle.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import nn

BUNDLE_FOLDER = Path(__file__).resolve().parent
WEIGHTS_FILE, SETTINGS_FILE = (
    "aop.pt",
    "aop.json",
)  # the network's tensors; its sizes and the ModelSpec


@contextmanager
def repository_modules() -> Iterator[None]:
    """Let imports in the block work as in the repository that the modules come from.

    There `model` is a package. Its files lie in aop/ here, and `model` is this file. `cv2` is the
    stand-in of opencv.py even if OpenCV is installed, so that every machine finds the same
    landmarks.
    """
    names = ["model", "cv2"]
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    package = ModuleType("model")
    package.__path__ = [str(BUNDLE_FOLDER / "aop")]
    sys.modules["model"] = package
    sys.modules["cv2"] = import_module("model.opencv")
    try:
        yield
    finally:
        del sys.modules["model"], sys.modules["cv2"]
        sys.modules.update(before)


with repository_modules():
    from model.anatomy import LANDMARKS, Floats
    from model.frame import Letterbox, cells_to_input
    from model.heatmap import HeatmapCodec, Heatmaps
    from model.masks import MaskError, landmarks_from_shares
    from model.network import TransUNetConfig, UNetConfig, build_network


class model:
    """Finds PS1, PS2 and FH1 in a transperineal ultrasound image. Codabench sets the names."""

    def __init__(self) -> None:
        self.folder = BUNDLE_FOLDER
        self.spec: dict[str, Any] = {}
        self.network: nn.Module | None = None

    def load(self, path: str = "./") -> model:
        """Read the weights in a folder; if it has none, those beside this file."""
        self.folder = Path(path) if (Path(path) / WEIGHTS_FILE).is_file() else BUNDLE_FOLDER
        text = (self.folder / SETTINGS_FILE).read_text(encoding="utf-8")
        settings = json.loads(text, object_hook=read_config)
        self.spec = settings["spec"]
        self.network = build_network(settings["network"], settings["masks"]).eval()
        state = torch.load(self.folder / WEIGHTS_FILE, map_location="cpu", weights_only=True)
        self.network.load_state_dict(state)
        return self

    def predict(self, X: Image) -> Floats:
        """A picture of any size -> (6,) x and y of PS1, PS2 and FH1, in px of the picture.

        Integer coordinates are pixel centres.

        Raises:
            RuntimeError: `load` has not been called.
        """
        if self.network is None:
            raise RuntimeError("no weights are loaded: call load() before predict()")
        spec = self.spec
        grey = np.asarray(X.convert("RGB").convert("L"))
        box = Letterbox(X.width, X.height, spec["input_size"])
        mean, std = np.float32(spec["mean"]), np.float32(spec["std"])
        scaled = (box.apply(grey).astype(np.float32) - mean) / std
        network_input = np.repeat(scaled[None, None], spec["channels"], axis=1)
        with torch.inference_mode():
            output = self.network(torch.from_numpy(network_input))
        maps = output[0] if isinstance(output, tuple) else output  # without the view score
        return box.to_image(self._landmarks(maps[0].numpy())).reshape(6)

    def _landmarks(self, maps: Heatmaps) -> Floats:
        """(3 + masks, rows, columns) -> (3, 2) in network input px, as in model/predictor.py."""
        spec, count = self.spec, len(LANDMARKS)
        codec = HeatmapCodec(maps.shape[1], maps.shape[2], spec["sigma_cells"])
        cells, _ = codec.decode(maps[:count], spec["decode"])
        landmarks = cells_to_input(cells, spec["stride"])
        if not (spec["masks"] and any(spec["mask_share"])):
            return landmarks
        try:
            from_masks = landmarks_from_shares(maps[count:], spec["input_size"])
        except MaskError:  # the masks show no outlines: the heatmaps' landmarks stand alone
            return landmarks
        share = np.array(spec["mask_share"])[:, None]
        return np.asarray((1 - share) * landmarks + share * from_masks)

    def save(self, path: str = "./") -> None:
        """Write the weights and the network's configuration into a folder, for `load`."""
        target = Path(path)
        target.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS_FILE, SETTINGS_FILE):
            (target / name).write_bytes((self.folder / name).read_bytes())


def read_config(values: dict[str, Any]) -> Any:
    """A JSON object with a `kind` as a network's configuration; any other stays a dict."""
    kinds = {"transunet": TransUNetConfig, "unet": UNetConfig}
    if "kind" not in values:
        return values
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return kinds[values["kind"]](**fields)
