"""Every kind of image file: how it is recognised, what its values become, when it is refused."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from model.frame import Geometry
from model.images import limits
from model.images.source import (
    SUFFIXES,
    BadFrame,
    GreyFrame,
    ImageError,
    is_supported_name,
    open_image,
)
from test.support.image_files import (
    GREY,
    RGB,
    STACK,
    H,
    W,
    assert_stack,
    dicom,
    frames,
    makers,
    save,
    single,
    stretched,
    write,
)

pytestmark = pytest.mark.filterwarnings("error")


# ---- Names and imports


@pytest.mark.parametrize("name", ["a.PNG", "a.nii.gz", "b.NII.GZ", "c.tiff", "d.mhd", "e.dcm"])
def test_supported_names(name: str) -> None:
    assert is_supported_name(Path("in") / name)


@pytest.mark.parametrize("name", ["a.raw", "a.zraw", "a.gz", "a.txt", "png", "a.png.txt"])
def test_other_names(name: str) -> None:
    assert not is_supported_name(Path("in") / name)


def test_import_is_light() -> None:
    code = (
        "import sys, model.images.source; print(sorted({'SimpleITK', 'torch'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True)
    assert run.stdout.strip() == b"[]"


# ---- Formats and shapes


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_lossless_pictures(tmp_path: Path, suffix: str) -> None:
    frame = single(write(tmp_path / f"a{suffix}", GREY))
    assert frame.pixels.dtype == np.uint8
    np.testing.assert_array_equal(frame.pixels, GREY)
    assert frame.geometry == Geometry()


@pytest.mark.parametrize("progressive", [0, 1])
def test_jpeg(tmp_path: Path, progressive: int) -> None:
    path = write(tmp_path / "a.jpg", RGB, cv2.IMWRITE_JPEG_PROGRESSIVE, progressive)
    expected = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2GRAY)
    np.testing.assert_array_equal(single(path).pixels, expected)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
@pytest.mark.parametrize("alpha", [False, True])
def test_colour_pictures(tmp_path: Path, suffix: str, alpha: bool) -> None:
    opaque = np.full((H, W), 255, np.uint8)
    image = np.dstack([RGB[..., ::-1], opaque]) if alpha else RGB[..., ::-1]
    frame = single(write(tmp_path / f"a{suffix}", image))
    np.testing.assert_array_equal(frame.pixels, cv2.cvtColor(RGB, cv2.COLOR_RGB2GRAY))


def test_equal_channels_are_that_plane(tmp_path: Path) -> None:
    frame = single(write(tmp_path / "a.png", np.dstack([GREY] * 3)))
    np.testing.assert_array_equal(frame.pixels, GREY)


def test_tiff_of_several_pages(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    assert cv2.imwritemulti(str(path), list(STACK))
    assert_stack(path, STACK)
    assert cv2.imwritemulti(str(path), [GREY] * 3)
    np.testing.assert_array_equal(single(path).pixels, GREY)


def test_resolution_of_pictures_is_not_trusted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", GREY, cv2.IMWRITE_TIFF_XDPI, 200, cv2.IMWRITE_TIFF_YDPI, 100)
    assert single(path).geometry == Geometry()


# ---- Values


@pytest.mark.parametrize("kind", [np.uint16, np.int16, np.int32, np.float32, np.float64])
def test_tiff_values(tmp_path: Path, kind: type) -> None:
    array = (GREY * 100.0 - (0 if kind is np.uint16 else 300)).astype(kind)
    frame = single(write(tmp_path / "a.tif", array))
    assert frame.pixels.dtype == np.float32
    np.testing.assert_allclose(frame.pixels, stretched(array), atol=1e-4)


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int16, np.uint32, np.int64, np.float64])
def test_volume_values(tmp_path: Path, kind: type) -> None:
    array = (GREY.astype(np.float64) - 100).clip(-100, 100).astype(kind)
    frame = single(save(tmp_path / "a.mha", array))
    assert frame.pixels.min() == 0 and frame.pixels.max() == 255
    np.testing.assert_allclose(frame.pixels, stretched(array), atol=1e-4)


def test_integers_within_a_byte_stay(tmp_path: Path) -> None:
    array = np.clip(GREY, 3, 200)
    for path in (write(tmp_path / "a.png", array.astype(np.uint16)), tmp_path / "a.mha"):
        if path.suffix == ".mha":
            save(path, array.astype(np.int32))
        frame = single(path)
        assert frame.pixels.dtype == np.uint8
        np.testing.assert_array_equal(frame.pixels, array)


def test_floats_are_stretched_even_within_a_byte(tmp_path: Path) -> None:
    array = np.clip(GREY, 3, 200).astype(np.float32)
    frame = single(save(tmp_path / "a.nii", array))
    np.testing.assert_allclose(frame.pixels, stretched(array), atol=1e-4)


def test_wide_colours_are_weighted_then_stretched(tmp_path: Path) -> None:
    array = RGB.astype(np.uint16) * 100
    frame = single(write(tmp_path / "a.png", array[..., ::-1]))
    np.testing.assert_allclose(frame.pixels, stretched(array @ [0.299, 0.587, 0.114]), atol=1e-3)


def bad_values() -> dict[str, tuple[np.ndarray, str]]:
    nan, infinite, extreme = (np.random.default_rng(1).random((H, W)) for _ in range(3))
    nan[3, 5], infinite[3, 5] = np.nan, -np.inf
    extreme[3, 5:7] = 1.7e308, -1.7e308
    return {
        "nan": (nan, "NaN or infinite"),
        "infinite": (infinite, "NaN or infinite"),
        "extreme": (extreme, "cannot be spread"),
        "constant": (np.full((H, W), 7.0), "constant"),
    }


@pytest.mark.parametrize("name", bad_values())
def test_unusable_values(tmp_path: Path, name: str) -> None:
    array, phrase = bad_values()[name]
    path = save(tmp_path / "a.mha", array)
    with pytest.raises(ImageError, match=phrase):
        open_image(path)
    good = np.random.default_rng(2).random((H, W))
    first, bad, last = frames(save(path, np.stack([good, array, good + good.T.reshape(H, W)])))
    assert isinstance(first, GreyFrame) and isinstance(last, GreyFrame) and last.slice_index == 2
    assert isinstance(bad, BadFrame) and phrase in bad.reason


def test_constant_picture(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="constant"):
        open_image(write(tmp_path / "a.png", np.full((H, W), 255, np.uint8)))


# ---- Recognition by content


@pytest.mark.parametrize("suffix", makers())
@pytest.mark.parametrize("name", ["b.jpg", "b.nii", "b.nii.gz", "B.DCM", "b"])
def test_content_not_suffix(tmp_path: Path, suffix: str, name: str) -> None:
    path = makers()[suffix](tmp_path).rename(tmp_path / name)
    np.testing.assert_array_equal(single(path).pixels, GREY)


def test_nifti_is_gzipped_or_not_whatever_its_name(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", STACK)
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert_stack(path, STACK)


def test_relative_path_and_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.nii", GREY)
    (tmp_path / "b.png").symlink_to("a.nii")
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(single(Path("b.png")).pixels, GREY)


# ---- Refusals


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_empty_and_text_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"")
    with pytest.raises(ImageError, match="empty"):
        open_image(path)
    path.write_text("not an image, whatever its name says\n" * 20)
    with pytest.raises(
        ImageError, match="DICOM data is damaged" if suffix == ".dcm" else "none of"
    ):
        open_image(path)


def test_missing_file_and_path_is_not_told(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot be read: No such file") as caught:
        open_image(tmp_path / "nowhere.png")
    assert "nowhere" not in str(caught.value)


@pytest.mark.parametrize("suffix", [*makers(), ".jpg"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.97])
def test_truncated_files(tmp_path: Path, suffix: str, kept: float) -> None:
    path = makers()[suffix](tmp_path) if suffix != ".jpg" else write(tmp_path / "a.jpg", GREY)
    cut = path.with_suffix(".raw") if suffix == ".mhd" else path
    data = cut.read_bytes()
    cut.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ImageError, match=r"truncated|none of") as caught:
        open_image(path)
    assert str(tmp_path) not in str(caught.value) and "\n" not in str(caught.value)


def test_jpeg_with_its_last_lines_cut_or_with_bytes_behind(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpg", GREY)
    data = path.read_bytes()
    path.write_bytes(data + b"\0" * 99)
    assert single(path).pixels.shape == (H, W)
    path.write_bytes(data[:-20])
    with pytest.raises(ImageError, match="JPEG data is truncated"):
        open_image(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
@pytest.mark.parametrize("suffix", [".png", ".dcm"])
def test_pipe_is_not_waited_for(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    os.mkfifo(path)
    ours = os.open(path, os.O_RDWR)  # a reader would get something
    os.write(ours, bytes(2**14))
    with pytest.raises(ImageError, match="it is a pipe"):
        open_image(path)
    os.close(ours)


def test_png_with_an_impossible_chunk(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", GREY)
    data = bytearray(path.read_bytes())
    data[33] = 0xFF  # a chunk of 4 GB, which OpenCV would make room for
    path.write_bytes(data)
    with pytest.raises(ImageError, match="PNG data is truncated"):
        open_image(path)


@pytest.mark.parametrize("suffix", [*makers(), ".jpg"])
def test_too_small(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MIN_SIDE", H + 1)
    path = makers()[suffix](tmp_path) if suffix != ".jpg" else write(tmp_path / "a.jpg", GREY)
    with pytest.raises(ImageError, match="60 x 40 px is too small: a side needs 41 px"):
        open_image(path)


def test_smallest_that_is_read(tmp_path: Path) -> None:
    assert single(write(tmp_path / "a.png", GREY[:32, :33])).pixels.shape == (32, 33)
    with pytest.raises(ImageError, match="33 x 31 px is too small"):
        open_image(write(tmp_path / "a.png", GREY[:31, :33]))


def test_three_equal_colour_frames_are_one_image(tmp_path: Path) -> None:
    path = dicom(tmp_path / "a.dcm", np.stack([RGB] * 3), "RGB")
    np.testing.assert_array_equal(single(path).pixels, cv2.cvtColor(RGB, cv2.COLOR_RGB2GRAY))
