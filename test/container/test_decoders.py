"""Files whose decoders may fail, many at once, with few threads and with many.

If AOP_IMAGE names an image, they are read in its container, with its limits of processes and
memory. Each run is made once; AOP_RUNS=20 pytest test/container/test_decoders.py makes 20.
"""

import os
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest

from test.container import strict
from test.container.test_fault_table import bomb_mha
from test.support.image_files import dicom
from test.support.runs import made, png
from test.support.strange_files import bits_flipped, valid, with_a_hole

pytestmark = pytest.mark.slow

RUNS = int(os.environ.get("AOP_RUNS", "1"))
DEFLATED = "1.2.840.10008.1.2.1.99"


def jpeg_2000(path: Path, image: np.ndarray) -> Path:
    without_loss = cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000
    boxes = cv2.imencode(".jp2", image, without_loss)[1].tobytes()
    return dicom(
        path, image[None], jpeg=[boxes[boxes.index(b"\xff\x4f\xff\x51") :]], syntax=".4.90"
    )


def deflated(path: Path, image: np.ndarray) -> Path:
    dataset = pydicom.dcmread(dicom(path, image[None]))
    dataset.file_meta.TransferSyntaxUID = DEFLATED
    dataset.save_as(path)
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 PNG and DICOM files; a third each is deflated, JPEG 2000 and PNG."""
    folder = tmp_path_factory.mktemp("mixed") / "in"
    folder.mkdir()
    for k in range(50):
        png(folder / f"{k:02d}.png", made(k % 5))
        jpeg_2000(folder / f"{k:02d}-j.dcm", made(k % 5))
        deflated(folder / f"{k:02d}-z.dcm", made(k % 5))
    return folder


@pytest.mark.parametrize("threads", [1, 2, 32, 64])
def test_any_number_of_threads(mixed: Path, tmp_path: Path, threads: int) -> None:
    for run in range(RUNS):
        options = ("--no-overlay", "--threads", str(threads))
        found = strict.run(mixed, tmp_path / str(run), *options)
        assert (found.status, found.err) == (0, "")
        angles = {entry["file"]: entry["aop_deg"] for entry in found.results["cases"]}
        assert len(angles) == 150
        for k in range(50):
            one, *others = (angles[f"{k:02d}{end}"] for end in (".png", "-j.dcm", "-z.dcm"))
            assert others == [one, one]


def test_damaged_files_cost_no_other_its_answer(tmp_path: Path) -> None:
    """Damage of all kinds in one folder, whose healthy files are all answered."""
    rng = np.random.default_rng(7)
    source = tmp_path / "in"
    source.mkdir()
    names = sorted(name for name in valid() if not name.endswith(("raw", ".mhd")))
    for k in range(150 * RUNS):
        name = names[int(rng.integers(len(names)))]
        data = bits_flipped(name, valid()[name], *rng.integers(2**14, size=2).tolist())
        if k % 3 == 0:
            data = with_a_hole(data, *rng.uniform(0.1, 0.5, 2))
        (source / f"{k:04d}-{name}").write_bytes(data)
    bomb_mha(source / "bomb.mha")
    for k in range(20):
        png(source / f"healthy-{k}.png", made(k % 5))
        jpeg_2000(source / f"healthy-{k}.dcm", made(k % 5))
    found = strict.run(source, tmp_path / "out", "--no-overlay", "--threads", "16")
    assert found.status == 1 and found.err.count("\n") == 1
    files = {entry["file"]: entry["status"] for entry in found.results["cases"]}
    assert len(files) == 150 * RUNS + 41 and files["bomb.mha"] == "failed"
    healthy = [status for file, status in files.items() if file.startswith("healthy")]
    assert healthy == ["ok"] * 40
