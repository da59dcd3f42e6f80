"""MetaImage, NIfTI and NRRD: shapes, stacks, and where the pixels lie."""

import os
import struct
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import SimpleITK as sitk

from model.frame import IDENTITY, Geometry
from model.images.source import GreyFrame, ImageError, open_image
from test.support.image_files import (
    GREY,
    RGB,
    STACK,
    VOLUMES,
    H,
    W,
    assert_stack,
    edit,
    frames,
    save,
    single,
    stretched,
)

pytestmark = pytest.mark.filterwarnings("error")


# ---- Formats and shapes


@pytest.mark.parametrize("suffix", VOLUMES)
def test_volume_formats_and_shapes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    for array in (GREY, GREY[None], np.stack([GREY] * 3), GREY[None, None], GREY[..., None]):
        np.testing.assert_array_equal(single(save(path, array)).pixels, GREY)
    grey = cv2.cvtColor(RGB, cv2.COLOR_RGB2GRAY)
    np.testing.assert_array_equal(single(save(path, RGB, vector=True)).pixels, grey)
    np.testing.assert_array_equal(single(save(path, RGB)).pixels, grey)
    for opacity in (255, 0):  # writers that know nothing of it leave it 0
        rgba = np.dstack([RGB, np.full_like(GREY, opacity)])
        np.testing.assert_array_equal(single(save(path, rgba, vector=True)).pixels, grey)
    hidden = np.arange(W) < 20
    rgba = np.dstack([RGB, np.where(hidden, 0, 255 + 0 * GREY)]).astype(np.uint8)
    pixels = single(save(path, rgba, vector=True)).pixels
    np.testing.assert_array_equal(pixels, np.where(hidden, 0, grey))


@pytest.mark.parametrize("suffix", VOLUMES)
@pytest.mark.parametrize("packed", [False, True])
def test_volume_stacks(tmp_path: Path, suffix: str, packed: bool) -> None:
    path = tmp_path / f"a{suffix}"
    for array in (STACK, STACK[:3], STACK[:2], STACK[None], STACK[:, None]):
        planes = array.reshape(-1, H, W)
        assert_stack(save(path, array, packed=packed), planes)
        over_time = array.ndim == 4 and array.shape[1] == 1
        slices = [frame.slice_index for frame in open_image(path).frames()]
        assert slices == ([0] * len(planes) if over_time else list(range(len(planes))))
    colours = np.stack([RGB, RGB[::-1], RGB[:, ::-1], 255 - RGB])
    expected = [cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY) for rgb in colours]
    assert_stack(save(path, colours, vector=True, packed=packed), expected)


def test_metaimage_in_ascii_and_in_big_endian(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mha", STACK)
    head, local, _ = path.read_bytes().partition(b"LOCAL\n")
    text = " ".join(map(str, STACK.ravel())).encode() + b"\n"
    path.write_bytes(head.replace(b"BinaryData = True", b"BinaryData = False") + local + text)
    assert_stack(path, STACK)
    wide = STACK.astype(">u2") * 200
    head = head.replace(b"OrderMSB = False", b"OrderMSB = True").replace(b"UCHAR", b"USHORT")
    path.write_bytes(head + local + wide.astype(">u2").tobytes())
    for frame, plane in zip(frames(path), wide, strict=True):
        np.testing.assert_allclose(frame.pixels, stretched(plane), atol=1e-4)


# ---- Refusals


def test_truncated_stack_gives_the_frames_that_are_there(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mha", STACK)
    path.write_bytes(path.read_bytes()[: -2 * H * W])
    items = frames(path)
    assert [isinstance(item, GreyFrame) for item in items] == [True] * 3 + [False] * 2
    assert "truncated" in items[4].reason
    np.testing.assert_array_equal(items[2].pixels, STACK[2])


@pytest.mark.parametrize("suffix", [".mha", ".mhd"])
def test_packed_metaimage_with_less_than_it_claims(tmp_path: Path, suffix: str) -> None:
    """ITK would fill it up with zeros, or never end on the sixth frame."""
    path = save(tmp_path / f"a{suffix}", STACK, packed=True)
    assert_stack(path, STACK)
    edit(path, b"DimSize = 60 40 5", b"DimSize = 60 40 6")
    with pytest.raises(ImageError, match="MetaImage data is damaged"):
        open_image(path)


def test_header_without_pixels(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mhd", GREY)
    (tmp_path / "a.raw").unlink()
    with pytest.raises(ImageError, match=r"data file a\.raw is missing: copy it beside the header"):
        open_image(path)


def test_metaimage_of_too_many_dimensions(tmp_path: Path) -> None:
    """ITK would crash on it."""
    path = edit(save(tmp_path / "a.mha", GREY), b"NDims = 2", b"NDims = 92")
    with pytest.raises(ImageError, match="none of the supported"):
        open_image(path)
    one = save(tmp_path / "a.mha", GREY).read_bytes().replace(b"NDims = 2", b"NDims = 1")
    path.write_bytes(one)
    with pytest.raises(ImageError, match="MetaImage data is damaged"):
        open_image(path)


def test_shapes_that_are_no_image(tmp_path: Path) -> None:
    path = tmp_path / "a.nrrd"
    with pytest.raises(ImageError, match=r"60 x 40 x 2 x 3: expected one image or one stack"):
        open_image(save(path, np.zeros((3, 2, H, W))))
    with pytest.raises(ImageError, match="a pixel has 2 values"):
        open_image(save(path, np.dstack([GREY, GREY]), vector=True))
    complex_image = sitk.RealAndImaginaryToComplex(*[sitk.GetImageFromArray(GREY * 1.0)] * 2)
    sitk.WriteImage(complex_image, str(path))
    with pytest.raises(ImageError, match="a pixel has 2 values"):
        open_image(path)


# ---- Padding

OUTSIDE = np.add(*np.indices((H, W))) < 30  # a corner
SIGNAL = GREY.astype(np.int16) * 4 - 100


@pytest.mark.parametrize("suffix", [".mha", ".nii", ".nii.gz", ".nrrd"])
@pytest.mark.parametrize(
    ("padding", "kind"),
    [
        *((padding, np.int16) for padding in (-1024, -2000, -2048, -3024, -32768)),
        *((-(2**31), np.int32), (-1024, np.float32), (float(np.finfo("f").min), np.float32)),
    ],
)
def test_padding_is_black(tmp_path: Path, suffix: str, padding: float, kind: type) -> None:
    array = np.where(OUTSIDE, kind(padding), SIGNAL.astype(kind))
    pixels = single(save(tmp_path / f"a{suffix}", array)).pixels
    assert not pixels[OUTSIDE].any()
    np.testing.assert_allclose(pixels[~OUTSIDE], stretched(SIGNAL[~OUTSIDE]), atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_padding_of_a_stack(tmp_path: Path, packed: bool) -> None:
    array = STACK.astype(np.int16)
    array[1, OUTSIDE] = -1024
    expected = STACK.copy()
    expected[1, OUTSIDE] = 0
    assert_stack(save(tmp_path / "a.mha", array, packed=packed), expected)


@pytest.mark.parametrize(
    "array",
    [
        np.where(OUTSIDE, -1024, SIGNAL * 12),  # the next value is not far, for so wide a range
        np.where(OUTSIDE, -1024, GREY.astype(np.int16) - 1025),
        np.where(np.arange(H * W).reshape(H, W) < 20, -1024, SIGNAL),  # less than 1 %
        np.where(OUTSIDE, -1000, SIGNAL),  # a value that nobody pads with
        np.where(OUTSIDE, -128, GREY.astype(np.int16) // 4).astype(np.int8),
        np.where(OUTSIDE, -1024, 7),  # nothing but padding
    ],
)
def test_what_is_not_padding(tmp_path: Path, array: np.ndarray) -> None:
    array = array if array.dtype == np.int8 else array.astype(np.int16)
    pixels = single(save(tmp_path / "a.mha", array)).pixels
    np.testing.assert_allclose(pixels, stretched(array), atol=1e-4)


# ---- Geometry


@pytest.mark.parametrize("suffix", VOLUMES)
def test_geometry_in_three_dimensions(tmp_path: Path, suffix: str) -> None:
    world = {
        "Spacing": (0.5, 0.25, 2.0),
        "Origin": (1.0, -2.0, 3.0),
        "Direction": (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    }
    path = save(tmp_path / f"a{suffix}", STACK, **world)
    source = open_image(path)
    assert (source.width, source.height) == (W, H)
    image = sitk.ReadImage(str(path))
    for frame in source.frames():
        assert frame.geometry == source.geometry
        assert frame.geometry.spacing_mm == (0.5, 0.25)
        expected = image.TransformIndexToPhysicalPoint((7, 11, frame.slice_index))
        np.testing.assert_allclose(
            frame.geometry.to_world([[7, 11]], frame.slice_index)[0], expected, atol=1e-5
        )


@pytest.mark.parametrize("suffix", VOLUMES)
def test_geometry_in_two_dimensions(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}", GREY, Spacing=(0.5, 0.25), Origin=(3.0, 4.0))
    geometry = single(path).geometry
    assert geometry.spacing_mm == (0.5, 0.25)
    assert geometry.world_spacing == (0.5, 0.25, 1.0)
    assert geometry.origin == (3.0, 4.0, 0.0)
    assert geometry.direction == IDENTITY


def test_geometry_over_time(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mha", STACK[:, None], Spacing=(0.5, 0.25, 2.0, 9.0))
    geometry = open_image(path).geometry
    assert geometry.world_spacing == (0.5, 0.25, 2.0)
    assert geometry.direction == IDENTITY


def test_geometry_where_channels_are_an_axis(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mha", RGB, Spacing=(1.0, 0.5, 0.25), Origin=(1.0, 2.0, 3.0))
    geometry = single(path).geometry
    assert geometry.spacing_mm == (0.5, 0.25)
    expected = sitk.ReadImage(str(path)).TransformIndexToPhysicalPoint((0, 7, 11))
    np.testing.assert_allclose(geometry.to_world([[7, 11]])[0], expected)


@pytest.mark.parametrize("suffix", VOLUMES)
def test_spacing_of_one_is_unknown(tmp_path: Path, suffix: str) -> None:
    frame = single(save(tmp_path / f"a{suffix}", GREY))
    assert frame.geometry.spacing_mm is None and frame.warnings == ()
    frame = single(save(tmp_path / f"a{suffix}", GREY, Spacing=(1.0, 2.0)))
    assert frame.geometry.spacing_mm == (1.0, 2.0)


@pytest.mark.parametrize("suffix", [".mha", ".mhd"])
@pytest.mark.parametrize(
    "spacing", [b"0 0.5 1", b"-2 0.5 1", b"nan 0.5 1", b"0.5 inf 1", b"a b c", b"1e200 1 1"]
)
def test_spacing_that_cannot_be(tmp_path: Path, suffix: str, spacing: bytes) -> None:
    path = save(tmp_path / f"a{suffix}", STACK)
    edit(path, b"ElementSpacing = 1 1 1", b"ElementSpacing = " + spacing)
    assert_stack(path, STACK)
    frame = next(open_image(path).frames())
    assert frame.geometry.spacing_mm is None
    assert "is impossible: lengths are given in px only" in frame.warnings[0]
    assert 0 not in frame.geometry.world_spacing
    np.testing.assert_allclose(
        frame.geometry.from_world(frame.geometry.to_world([[7, 11]], 2)), [[7, 11, 2]]
    )


def test_slices_without_thickness_keep_their_spacing(tmp_path: Path) -> None:
    path = edit(save(tmp_path / "a.mha", STACK), b"Spacing = 1 1 1", b"Spacing = 0.5 0.25 0")
    assert_stack(path, STACK)
    frame = next(open_image(path).frames())
    assert frame.geometry.spacing_mm == (0.5, 0.25) and frame.warnings == ()
    assert frame.geometry.world_spacing == (0.5, 0.25, 1.0)


def test_nrrd_with_a_spacing_of_zero(tmp_path: Path) -> None:
    path = edit(save(tmp_path / "a.nrrd", STACK), b": (1,0,0) (0,1,0)", b": (0,0,0) (0,1,0)")
    assert_stack(path, STACK)
    assert open_image(path).geometry == Geometry()
    assert "0 x 1 mm" in next(open_image(path).frames()).warnings[0]


def test_axes_that_span_no_space(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mha", STACK, Spacing=(0.5, 0.25, 2.0))
    edit(path, b"Matrix = 1 0 0 0 1 0", b"Matrix = 1 0 0 1 0 0")
    assert_stack(path, STACK)
    frame = next(open_image(path).frames())
    assert frame.geometry == Geometry((0.5, 0.25), (0.5, 0.25, 2.0))
    assert "taken as unrotated" in frame.warnings[0]


# ---- Real files


@pytest.mark.real
def test_psfhs_volumes_equal_the_pictures(psfhs: Path) -> None:
    """PSFHS ships each image as .mha of three equal planes and as .png."""
    volumes = sorted((psfhs / "original_format" / "image_mha").glob("*.mha"))
    assert volumes
    for volume in volumes:
        frame = single(volume)
        assert frame.pixels.dtype == np.uint8
        expected = cv2.imread(str(psfhs / "images" / f"{volume.stem}.png"), cv2.IMREAD_GRAYSCALE)
        np.testing.assert_array_equal(frame.pixels, expected)
        np.testing.assert_array_equal(
            single(psfhs / "images" / f"{volume.stem}.png").pixels, expected
        )


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nifti_with_values_that_are_not_finite(tmp_path: Path, suffix: str, value: float) -> None:
    """ITK makes zeros of them."""
    stack = STACK.astype(np.float32)
    stack[3, 5, 7] = value
    path = save(tmp_path / f"a{suffix}", stack)
    if suffix == ".nii":
        items = frames(path)
        assert [isinstance(item, GreyFrame) for item in items] == [True] * 3 + [False, True]
        assert "NaN or infinite" in items[3].reason
    else:
        with pytest.raises(ImageError, match="NaN or infinite"):
            open_image(path)
    with pytest.raises(ImageError, match="NaN or infinite"):
        open_image(save(tmp_path / f"b{suffix}", stack[3]))


def test_nifti_with_a_negative_pixel_size(tmp_path: Path) -> None:
    """Its sign has no meaning there."""
    path = save(tmp_path / "a.nii", GREY, Spacing=(0.2, 0.3))
    old = struct.pack("<3f", 1, 0.2, 0.3)
    edit(path, old, struct.pack("<3f", 1, -0.2, 0.3))
    frame = single(path)
    assert frame.geometry.spacing_mm == pytest.approx((0.2, 0.3)) and frame.warnings == ()


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nii", ".nrrd"])
def test_paths_that_are_not_utf8(tmp_path: Path, suffix: str) -> None:
    """They would end the process in which ITK reads them."""
    folder = tmp_path / os.fsdecode(b"M\xfcller")
    folder.mkdir()
    save(tmp_path / f"a{suffix}", GREY)
    for file in tmp_path.glob("a.*"):
        file.rename(folder / file.name)
    np.testing.assert_array_equal(single(folder / f"a{suffix}").pixels, GREY)
    if suffix != ".mhd":
        other = (folder / f"a{suffix}").rename(folder / os.fsdecode(b"\xfc" + suffix.encode()))
        np.testing.assert_array_equal(single(other).pixels, GREY)


@pytest.mark.parametrize("vector", [False, True])
def test_padding_counts_in_equal_planes_too(tmp_path: Path, vector: bool) -> None:
    values = GREY.astype(np.int16) * 3
    values[:, :20] = -1024
    planes = np.dstack([values] * 3) if vector else np.stack([values] * 3)
    pixels = single(save(tmp_path / "a.mha", planes, vector=vector)).pixels
    assert (pixels[:, :20] == 0).all()
    np.testing.assert_allclose(pixels[:, 20:], stretched(values[:, 20:]), atol=1e-3)
