"""Pack trained weights into a submission for Codabench: a zip that needs nothing else.

    python -m export.codabench --weights model/weights/aop.safetensors --output submission.zip

The zip holds `metadata`, the weights, their model card, LICENSE, NOTICE and model.py. The ingestion
program calls the class `model` (load, predict, save) in model.py. The modules of model/ that it
needs lie unchanged in the folder aop/. The bundle runs on the CPU with Python 3.9, torch 2.0, numpy
and Pillow, or newer versions. It does not use OpenCV.

Before the zip is written, it is unpacked and run in a process of its own, without this repository.
Its landmarks must equal the predictor's within 0.1 px. The same weights give the same bytes.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from model.images.grey import to_grey
from training.evaluation.predict import torch_predictor
from training.learning.checkpoint import Checkpoint, CheckpointError, load_weights

TOLERANCE_IMAGE_PX = 0.1
ROOT = Path(__file__).resolve().parent.parent
MODULES = ("anatomy.py", "frame.py", "heatmap.py", "masks.py", "network/*.py")  # in model/
SPEC_FIELDS = {  # the fields of the ModelSpec that model.py reads
    "input_size", "channels", "mean", "std", "stride", "sigma_cells", "masks", "mask_share",
    "decode",
}  # fmt: skip
MODEL_CARD = "MODEL_CARD.md"
ABSENT_MODULES = (  # this repository, and packages that an ingestion program may lack
    "SimpleITK", "cv2", "onnx", "onnxruntime", "pydantic", "safetensors", "torchvision", "tqdm",
    "export", "process", "training",
)  # fmt: skip
# calls a bundle as an ingestion program does, in a process of its own
DRIVER = """
import sys
import numpy as np
from PIL import Image
bundle, images, answers, *absent = sys.argv[1:]
sys.path[0] = bundle
sys.modules.update(dict.fromkeys(absent))  # None makes an import fail
from model import model
network = model().load(bundle)
with np.load(images) as pictures:
    landmarks = [network.predict(Image.fromarray(pictures[name])) for name in pictures.files]
np.save(answers, landmarks)
"""
RgbImage = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class BundleOptions:
    """What the command line asks for; each field is the option of its name.

    name: None means the model's own.
    """

    weights: Path
    output: Path
    name: str | None
    description: str


class BundleError(ValueError):
    """The bundle cannot be written, or does not run as it should; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = BundleOptions(**vars(_parser().parse_args(arguments)))
    try:
        write_bundle(options)
    except (BundleError, CheckpointError, OSError) as error:
        print(f"export.codabench: {error}", file=sys.stderr)
        return 2
    return 0


def write_bundle(options: BundleOptions) -> None:
    """Write the zip, after a check that it runs alone and finds the predictor's landmarks.

    Raises:
        BundleError: the check failed, or the output path is not usable; nothing is written.
    """
    output = options.output
    if output.is_dir():
        raise BundleError(f"{output} is a folder; expected a file, as in {output}/submission.zip")
    if not output.parent.is_dir():
        raise BundleError(f"there is no folder {output.parent} for {output.name}: make it first")
    network, described = load_weights(options.weights)
    name = one_line(options.name or described.spec.name)
    about = one_line(options.description)
    files = bundle_files(network, described, name, about, options.weights.parent)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        draft = Path(folder) / "draft.zip"
        write_zip(draft, files)
        size_mb = draft.stat().st_size / 1e6
        print(f"{len(files)} files, {size_mb:.1f} MB; now the bundle runs on its own", flush=True)
        worst, count = compare_with_predictor(draft, network, described)
        print(f"{count} pictures, largest difference to the predictor {worst:.4f} px")
        if not worst <= TOLERANCE_IMAGE_PX:
            raise BundleError(
                f"the bundle's landmarks differ from the predictor's by {worst:.3f} px, allowed "
                f"are {TOLERANCE_IMAGE_PX}; nothing is written"
            )
        draft.replace(output)
    print(f"{output} is ready: upload it under 'My Submissions' of the challenge on Codabench")


def bundle_files(
    network: nn.Module, described: Checkpoint, name: str, about: str, beside: Path
) -> dict[str, bytes]:
    """Name -> content of every file in the bundle.

    Args:
        name, about: one line each, for `metadata`.
        beside: folder of the weights; if it holds a model card, that goes into the bundle.
    """
    state = io.BytesIO()
    torch.save({key: value.contiguous() for key, value in network.state_dict().items()}, state)
    spec = described.spec
    settings = described.model_dump(mode="json", include={"network", "masks"})
    settings["spec"] = spec.model_dump(mode="json", include=SPEC_FIELDS)
    notice = (
        f"{name}\n\nCode: Apache-2.0, see LICENSE. Research use only; not a medical device.\n"
        f"Weights, trained on: {spec.training_data or 'not stated'}\n"
        f"Licence of the data: {spec.licence or 'not stated'}\n"
    )
    files = {
        "metadata": f"description: {json.dumps(f'{name}: {about}', ensure_ascii=False)}\n".encode(),
        "aop.pt": state.getvalue(),
        "aop.json": f"{json.dumps(settings, indent=1)}\n".encode(),
        "LICENSE": (ROOT / "LICENSE").read_bytes(),
        "NOTICE": notice.encode(),
        **bundle_sources(),
    }
    if (beside / MODEL_CARD).is_file():
        files[MODEL_CARD] = (beside / MODEL_CARD).read_bytes()
    return files


def bundle_sources() -> dict[str, bytes]:
    """Name -> content of every Python file in the bundle, unchanged from this repository."""
    model, bundle = ROOT / "model", ROOT / "export" / "codabench_bundle"
    files = {"model.py": bundle / "model.py", "aop/opencv.py": bundle / "opencv.py"}
    for pattern in MODULES:
        files |= {f"aop/{path.relative_to(model).as_posix()}": path for path in model.glob(pattern)}
    return {name: path.read_bytes() for name, path in files.items()}


def write_zip(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a zip whose bytes depend only on its content: sorted, uncompressed, of a fixed date."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            archive.writestr(entry, files[name])


def compare_with_predictor(
    bundle: Path, network: nn.Module, described: Checkpoint
) -> tuple[float, int]:
    """The largest distance in image px between the bundle's landmarks and the predictor's.

    The second value is the number of pictures compared.

    Raises:
        BundleError: the bundle does not run.
    """
    pictures = [
        draw_sketch(640, 480),
        draw_sketch(256, 256),
        draw_sketch(190, 141),
        draw_sketch(301, 517),
    ]
    predictor = torch_predictor(network, described.spec, torch.device("cpu"))
    expected = [predictor.predict(to_grey(picture)).landmarks_px for picture in pictures]
    with tempfile.TemporaryDirectory() as folder:
        unpacked, images, answers = (Path(folder, name) for name in ("b", "in.npz", "out.npy"))
        with zipfile.ZipFile(bundle) as archive:
            archive.extractall(unpacked)
        np.savez(images, *pictures)
        command = [
            sys.executable,
            "-c",
            DRIVER,
            str(unpacked),
            str(images),
            str(answers),
            *ABSENT_MODULES,
        ]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if ran.returncode:
            last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
            raise BundleError(f"the bundle does not run on its own ({last}); nothing is written")
        landmarks = np.load(answers).reshape(-1, 3, 2)
    return float(np.linalg.norm(landmarks - np.array(expected), axis=-1).max()), len(pictures)


def draw_sketch(width: int, height: int) -> RgbImage:
    """(height, width, 3) rough drawing of a pubic symphysis above a fetal head, in tinted grey."""
    rng = np.random.default_rng((width, height))
    unit = min(width, height)
    left, top = (width - unit) / 2, (height - unit) / 2
    speckle = rng.gamma(2.0, 0.5, (height, width)).astype(np.float32)
    echo = np.full((height, width), 60, np.float32)
    for x, y, long, short, degrees, inside, outline in (
        (0.50, 0.55, 0.30, 0.25, 100, 12, 200),
        (0.38, 0.17, 0.12, 0.06, 165, 110, 190),
    ):
        centre = round(left + x * unit), round(top + y * unit)
        axes = round(long * unit), round(short * unit)
        cv2.ellipse(echo, centre, axes, degrees, 0, 360, inside, -1)
        cv2.ellipse(echo, centre, axes, degrees, 0, 360, outline, max(1, unit // 60))
    grey = cv2.GaussianBlur(echo * speckle, (0, 0), unit / 250)
    tint = np.array([1.0, 0.96, 0.9], np.float32)
    return np.asarray(np.clip(grey[..., None] * tint, 0, 255), np.uint8)


def one_line(text: str) -> str:
    """A text without line breaks, as `metadata` requires."""
    return " ".join(text.split())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "export.codabench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--weights", type=Path, required=True, help=".safetensors file with .json beside it"
    )
    parser.add_argument("--output", type=Path, required=True, help="zip file to write")
    parser.add_argument("--name", help="name of the submission (default: the model's)")
    parser.add_argument(
        "--description",
        metavar="TEXT",
        default="PS1, PS2 and FH1 for the angle of progression",
        help="text in `metadata` after the name (%(default)s)",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
