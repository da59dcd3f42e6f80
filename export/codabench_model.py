"""The model that Codabench's ingestion program drives: model.py of the bundle.

    network = model().load("./")
    x1, y1, x2, y2, x3, y3 = network.predict(image)

It runs on the CPU and needs Python 3.9, torch 2.0, numpy and Pillow, or newer ones; no other
package is used even where it is there. Made by `python -m export.codabench`.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))  # an ingestion program may load this file alone, by its path

from export.codabench_pydantic import SETTINGS, WEIGHTS, read_models  # noqa: E402
from model.anatomy import Floats  # noqa: E402
from model.frame import Pixels  # noqa: E402
from model.heatmap import Heatmaps  # noqa: E402
from model.images.grey import to_grey  # noqa: E402
from model.images.limits import ImageError  # noqa: E402
from model.network import build_network  # noqa: E402
from model.predictor import Output, Predictor  # noqa: E402


class model:
    """Finds PS1, PS2 and FH1 in a transperineal ultrasound image."""

    def __init__(self) -> None:
        self.folder = HERE
        self.predictor: Predictor | None = None

    def load(self, path: str = "./") -> "model":
        """Read the weights in a folder; those beside this file where the folder has none."""
        self.folder = Path(path) if (Path(path) / WEIGHTS).is_file() else HERE
        settings = read_models((self.folder / SETTINGS).read_text(encoding="utf-8"))
        state = torch.load(self.folder / WEIGHTS, map_location="cpu", weights_only=True)
        self.network = build_network(settings["network"], settings["masks"])
        self.network.load_state_dict(state)
        self.network.eval()
        self.predictor = Predictor(settings["spec"], self._run, "cpu")
        return self

    def predict(self, X: Image) -> Floats:
        """A picture of any size -> (6,) x and y of PS1, PS2 and FH1, in px of the picture.

        Integer coordinates are pixel centres.
        """
        if self.predictor is None:
            raise RuntimeError("no weights are loaded: call load() before predict()")
        return self.predictor.predict(_grey(X)).landmarks_px.reshape(6)

    def save(self, path: str = "./") -> None:
        """Write the weights and what rebuilds the network into a folder, for `load`."""
        target = Path(path)
        target.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, SETTINGS):
            (target / name).write_bytes((self.folder / name).read_bytes())

    def _run(self, network_input: Heatmaps) -> Output:
        with torch.inference_mode():
            found = self.network(torch.from_numpy(network_input))
        maps = found[0] if isinstance(found, tuple) else found  # a view score is of no use here
        return Output(maps.numpy())


def _grey(image: Image) -> Pixels:
    pixels = np.asarray(image.convert("RGB"))
    try:
        return to_grey(pixels)
    except ImageError:  # it is of one colour; the challenge wants an answer for every image
        return np.ascontiguousarray(pixels[..., 0])
