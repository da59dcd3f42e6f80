"""The model that Codabench's ingestion program drives: model.py of the bundle.

    network = model().load("./")
    x1, y1, x2, y2, x3, y3 = network.predict(image)

It runs on the CPU and needs Python 3.9, torch 2.0, numpy and Pillow, or newer ones. It uses no
other package, even if one is installed. Made by `python -m export.codabench`.
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

HERE = Path(__file__).resolve().parent
WEIGHTS, SETTINGS = "aop.pt", "aop.json"  # the network's tensors; its sizes and the ModelSpec


@contextmanager
def repository_modules() -> Iterator[None]:
    """Import modules in the block as in the repository that they come from.

    There `model` is a package, whose files lie in aop/ here; here `model` is this file. OpenCV is
    its stand-in, even if it is installed: the landmarks then are the same on every machine.
    """
    names = ["model", "cv2"]
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    package = ModuleType("model")
    package.__path__ = [str(HERE / "aop")]
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
    """Finds PS1, PS2 and FH1 in a transperineal ultrasound image."""

    def __init__(self) -> None:
        self.folder = HERE
        self.spec: dict[str, Any] = {}
        self.network: nn.Module | None = None

    def load(self, path: str = "./") -> model:
        """Read the weights in a folder, or those beside this file if the folder has none."""
        self.folder = Path(path) if (Path(path) / WEIGHTS).is_file() else HERE
        text = (self.folder / SETTINGS).read_text(encoding="utf-8")
        settings = json.loads(text, object_hook=read_config)
        self.spec = settings["spec"]
        self.network = build_network(settings["network"], settings["masks"]).eval()
        state = torch.load(self.folder / WEIGHTS, map_location="cpu", weights_only=True)
        self.network.load_state_dict(state)
        return self

    def predict(self, X: Image) -> Floats:
        """A picture of any size -> (6,) x and y of PS1, PS2 and FH1, in px of the picture.

        Integer coordinates are pixel centres.
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
            found = self.network(torch.from_numpy(network_input))
        maps = found[0] if isinstance(found, tuple) else found  # the view score is of no use here
        return box.to_image(self._landmarks(maps[0].numpy())).reshape(6)

    def _landmarks(self, maps: Heatmaps) -> Floats:
        """(3 + masks, rows, columns) -> (3, 2) in network input px, as model/predictor.py does."""
        spec, count = self.spec, len(LANDMARKS)
        codec = HeatmapCodec(maps.shape[1], maps.shape[2], spec["sigma_cells"])
        cells, _ = codec.decode(maps[:count], spec["decode"])
        landmarks = cells_to_input(cells, spec["stride"])
        if not (spec["masks"] and any(spec["mask_share"])):
            return landmarks
        try:
            second = landmarks_from_shares(maps[count:], spec["input_size"])
        except MaskError:  # no outlines were found: the heatmaps' landmarks stand alone
            return landmarks
        share = np.array(spec["mask_share"])[:, None]
        return np.asarray((1 - share) * landmarks + share * second)

    def save(self, path: str = "./") -> None:
        """Write the weights and what rebuilds the network into a folder, for `load`."""
        target = Path(path)
        target.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, SETTINGS):
            (target / name).write_bytes((self.folder / name).read_bytes())


def read_config(values: dict[str, Any]) -> Any:
    """A network's configuration from its JSON object; any other object stays a dict."""
    kinds = {"transunet": TransUNetConfig, "unet": UNetConfig}
    if "kind" not in values:
        return values
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return kinds[values["kind"]](**fields)
