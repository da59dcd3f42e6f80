"""Every kind and shape of file that can come, made here from synthetic arrays with W != H."""

import gzip
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import SimpleITK as sitk

from model import image as image_module
from model.frame import IDENTITY, Geometry
from model.image import BadFrame, GreyFrame, ImageError, is_supported_name, open_image

H, W = 40, 60
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (H, W), dtype=np.uint8)
RGB = cv2.GaussianBlur(RNG.integers(0, 256, (H, W, 3), dtype=np.uint8), (0, 0), 3)
STACK = RNG.integers(0, 256, (5, H, W), dtype=np.uint8)
VOLUMES = (".mha", ".mhd", ".nii", ".nii.gz", ".nrrd")

pytestmark = pytest.mark.filterwarnings("error")


def save(
    path: Path, array: np.ndarray, vector: bool = False, packed: bool = False, **world
) -> Path:
    """Write by SimpleITK; `world` names its setters: Spacing, Origin, Direction."""
    image = sitk.GetImageFromArray(array, isVector=vector)
    for name, value in world.items():
        getattr(image, f"Set{name}")(value)
    sitk.WriteImage(image, str(path), packed)
    return path


def write(path: Path, array: np.ndarray, *options: int) -> Path:
    assert cv2.imwrite(str(path), array, options)
    return path


def edit(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    return path


def single(path: Path) -> GreyFrame:
    source = open_image(path)
    assert not source.is_stack and source.frame_count == 1
    (frame,) = source.frames()
    assert frame.index is None and frame.slice_index == 0
    assert frame.pixels.shape == (source.height, source.width)
    assert frame.pixels.flags.c_contiguous
    return frame


def frames(path: Path) -> list[GreyFrame | BadFrame]:
    source = open_image(path)
    assert source.is_stack
    items = list(source.frames())
    assert len(items) == source.frame_count
    assert [item.index for item in items] == list(range(len(items)))
    return items


def assert_stack(path: Path, expected: np.ndarray) -> None:
    items = frames(path)
    assert len(items) == len(expected)
    for item, plane in zip(items, expected, strict=True):
        np.testing.assert_array_equal(item.pixels, plane)


def stretched(array: np.ndarray) -> np.ndarray:
    values = array.astype(np.float64)
    return (values - values.min()) / np.ptp(values) * 255


# ---- DICOM, by hand: SimpleITK writes neither YBR nor the sequences of an ultrasound machine


def element(tag: int, kind: str, value: str | bytes | int) -> bytes:
    if isinstance(value, int):
        value = struct.pack("<H", value)
    value = value.encode() if isinstance(value, str) else value
    value += b"\0" * (len(value) % 2) if kind == "UI" else b" " * (len(value) % 2)
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + kind.encode()
    long = kind in ("OB", "OW", "SQ")
    return (
        head + (struct.pack("<2xI", len(value)) if long else struct.pack("<H", len(value))) + value
    )


def item(value: bytes) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(value)) + value


def region(x_cm: float, y_cm: float, unit: int = 3) -> bytes:
    """One item of the Sequence of Ultrasound Regions."""
    return item(
        element(0x00186024, "US", unit)
        + element(0x00186026, "US", 3)
        + element(0x00186028, "FD", struct.pack("<d", 0))
        + element(0x0018602C, "FD", struct.pack("<d", x_cm))
        + element(0x0018602E, "FD", struct.pack("<d", y_cm))
    )


def dicom(
    path: Path,
    pixels: np.ndarray,
    colours: str = "MONOCHROME2",
    spacing: str = "",
    regions: bytes = b"",
    number: int | None = None,
    jpeg: list[bytes] | None = None,
    preamble: bool = True,
) -> Path:
    """A multi-frame ultrasound file of (frames, H, W[, 3]) pixels, or of frames packed as JPEG."""
    kind = "1.2.840.10008.5.1.4.1.1.3.1"
    syntax = "1.2.840.10008.1.2.4.50" if jpeg else "1.2.840.10008.1.2.1"
    meta = element(0x00020001, "OB", b"\0\1") + element(0x00020002, "UI", kind)
    meta += element(0x00020003, "UI", "1.2.3") + element(0x00020010, "UI", syntax)
    meta = element(0x00020000, "UL", struct.pack("<I", len(meta))) + meta
    bits = 8 * pixels.dtype.itemsize
    data = element(0x00080016, "UI", kind) + element(0x00080018, "UI", "1.2.3")
    data += element(0x00186011, "SQ", regions) if regions else b""
    data += element(0x00200013, "IS", str(number)) if number is not None else b""
    data += element(0x00280002, "US", 3 if pixels.ndim == 4 else 1)
    data += element(0x00280004, "CS", colours)
    data += element(0x00280006, "US", 0) if pixels.ndim == 4 else b""
    data += element(0x00280008, "IS", str(len(pixels))) + element(0x00280010, "US", pixels.shape[1])
    data += element(0x00280011, "US", pixels.shape[2])
    data += element(0x00280030, "DS", spacing) if spacing else b""
    for tag, value in ((0x100, bits), (0x101, bits), (0x102, bits - 1), (0x103, 0)):
        data += element(0x00280000 + tag, "US", value)
    if jpeg:
        data += struct.pack("<HH2s2xI", 0x7FE0, 0x10, b"OB", 0xFFFFFFFF) + item(b"")
        data += b"".join(item(part + b"\0" * (len(part) % 2)) for part in jpeg)
        data += struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    else:
        data += element(0x7FE00010, "OW" if bits == 16 else "OB", pixels.tobytes())
    path.write_bytes((b"\0" * 128 + b"DICM" + meta if preamble else b"") + data)
    return path


# ---- Names and imports


@pytest.mark.parametrize("name", ["a.PNG", "a.nii.gz", "b.NII.GZ", "c.tiff", "d.mhd", "e.dcm"])
def test_supported_names(name: str) -> None:
    assert is_supported_name(Path("in") / name)


@pytest.mark.parametrize("name", ["a.raw", "a.zraw", "a.gz", "a.txt", "png", "a.png.txt"])
def test_other_names(name: str) -> None:
    assert not is_supported_name(Path("in") / name)


def test_import_is_light() -> None:
    code = "import sys, model.image; print(sorted({'SimpleITK', 'torch'} & set(sys.modules)))"
    root = Path(__file__).parent.parent
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
    image = np.dstack([RGB[..., ::-1], GREY]) if alpha else RGB[..., ::-1]
    frame = single(write(tmp_path / f"a{suffix}", image))
    np.testing.assert_array_equal(frame.pixels, cv2.cvtColor(RGB, cv2.COLOR_RGB2GRAY))


def test_equal_channels_are_that_plane(tmp_path: Path) -> None:
    frame = single(write(tmp_path / "a.png", np.dstack([GREY] * 3)))
    np.testing.assert_array_equal(frame.pixels, GREY)


@pytest.mark.parametrize("suffix", VOLUMES)
def test_volume_formats_and_shapes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    for array in (GREY, GREY[None], np.stack([GREY] * 3), GREY[None, None], GREY[..., None]):
        np.testing.assert_array_equal(single(save(path, array)).pixels, GREY)
    grey = cv2.cvtColor(RGB, cv2.COLOR_RGB2GRAY)
    np.testing.assert_array_equal(single(save(path, RGB, vector=True)).pixels, grey)
    np.testing.assert_array_equal(single(save(path, RGB)).pixels, grey)
    rgba = np.dstack([RGB, GREY])
    np.testing.assert_array_equal(single(save(path, rgba, vector=True)).pixels, grey)


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


def test_tiff_of_several_pages(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    assert cv2.imwritemulti(str(path), list(STACK))
    assert_stack(path, STACK)
    assert cv2.imwritemulti(str(path), [GREY] * 3)
    np.testing.assert_array_equal(single(path).pixels, GREY)


def test_tiff_pages_of_other_sizes_and_pyramids(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    assert cv2.imwritemulti(str(path), [GREY, GREY[:, :50], GREY[:31]])
    first, second, third = frames(path)
    np.testing.assert_array_equal(first.pixels, GREY)
    np.testing.assert_array_equal(second.pixels, GREY[:, :50])
    assert "60 x 31 px is too small" in third.reason

    pillow = pytest.importorskip("PIL.Image")
    pages = [pillow.fromarray(GREY), pillow.fromarray(GREY[::2, ::2])]
    for page, subfile in zip(pages, (0, 1), strict=True):
        page.encoderinfo = {"tiffinfo": {254: subfile}}
    pages[0].save(path, save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(single(path).pixels, GREY)
    pages[0].save(path, big_tiff=True)
    assert path.read_bytes()[:4] == b"II+\0"
    np.testing.assert_array_equal(single(path).pixels, GREY)
    path.write_bytes(path.read_bytes()[:8] + b"\xff" * 8)
    with pytest.raises(ImageError, match="TIFF data is damaged"):
        open_image(path)


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


def makers() -> dict[str, Callable[[Path], Path]]:
    return {
        **{
            name: lambda path, s=name: write(path / f"a{s}", GREY)
            for name in (".png", ".bmp", ".tif")
        },
        **{name: lambda path, s=name: save(path / f"a{s}", GREY) for name in VOLUMES},
        ".dcm": lambda path: dicom(path / "a.dcm", GREY[None]),
    }


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


@pytest.mark.parametrize("suffix", image_module.SUFFIXES)
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


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_tiff_with_its_pixels_cut(tmp_path: Path, kind: type) -> None:
    """The directory stands first, so that only reading the pixels can find out."""
    pillow = pytest.importorskip("PIL.Image")
    pillow.fromarray(GREY.astype(kind)).save(tmp_path / "a.tif")
    data = (tmp_path / "a.tif").read_bytes()
    assert struct.unpack_from("<I", data, 4)[0] < 20
    (tmp_path / "a.tif").write_bytes(data[:-900])
    with pytest.raises(ImageError, match="TIFF data is damaged"):
        open_image(tmp_path / "a.tif")


def test_jpeg_with_its_last_lines_cut_or_with_bytes_behind(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpg", GREY)
    data = path.read_bytes()
    path.write_bytes(data + b"\0" * 99)
    assert single(path).pixels.shape == (H, W)
    path.write_bytes(data[:-20])
    with pytest.raises(ImageError, match="JPEG data is truncated"):
        open_image(path)


def test_truncated_stack_gives_the_frames_that_are_there(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mha", STACK)
    path.write_bytes(path.read_bytes()[: -2 * H * W])
    items = frames(path)
    assert [isinstance(item, GreyFrame) for item in items] == [True] * 3 + [False] * 2
    assert "truncated" in items[4].reason
    np.testing.assert_array_equal(items[2].pixels, STACK[2])


def test_header_without_pixels(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mhd", GREY)
    (tmp_path / "a.raw").unlink()
    with pytest.raises(ImageError, match="MetaImage data is damaged"):
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


def test_png_with_an_impossible_chunk(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", GREY)
    data = bytearray(path.read_bytes())
    data[33] = 0xFF  # a chunk of 4 GB, which OpenCV would make room for
    path.write_bytes(data)
    with pytest.raises(ImageError, match="PNG data is truncated"):
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


def too_large() -> dict[str, Callable[[Path], Path]]:
    """Small files whose headers claim 70000 x 1000 px."""
    new = {code: struct.pack(code, 70000, 1000) for code in (">II", "<ii")}

    def picture(path: Path, at: int, code: str) -> Path:
        data = bytearray(write(path, GREY).read_bytes())
        data[at : at + 8] = new[code]
        path.write_bytes(data)
        return path

    def tiff(path: Path) -> Path:
        data = write(path, GREY).read_bytes()
        for tag, old, value in ((256, W, 70000), (257, H, 1000)):
            entry = next(
                entry
                for kind in (3, 4)
                if (entry := struct.pack("<HHII", tag, kind, 1, old)) in data
            )
            data = data.replace(entry, struct.pack("<HHII", tag, 4, 1, value))
        path.write_bytes(data)
        return path

    def header(path: Path, old: bytes, claim: bytes) -> Path:
        return edit(save(path, GREY), old, claim)

    return {
        "png": lambda path: picture(path / "a.png", 16, ">II"),
        "bmp": lambda path: picture(path / "a.bmp", 18, "<ii"),
        "tif": lambda path: tiff(path / "a.tif"),
        "mha": lambda path: header(path / "a.mha", b"DimSize = 60 40", b"DimSize = 70000 1000"),
        "nrrd": lambda path: header(path / "a.nrrd", b"sizes: 60 40", b"sizes: 70000 1000"),
    }


@pytest.mark.parametrize("name", too_large())
def test_too_large_is_refused_from_the_header(tmp_path: Path, name: str) -> None:
    path = too_large()[name](tmp_path)
    with pytest.raises(ImageError, match="70000 x 1000 px is larger than 64 Mpx"):
        open_image(path)


def test_jpeg_too_large(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpg", GREY)
    edit(path, struct.pack(">BHH", 8, H, W), struct.pack(">BHH", 8, 60000, 60000))
    with pytest.raises(ImageError, match="60000 x 60000 px is larger"):
        open_image(path)


@pytest.mark.parametrize("suffix", [*makers(), ".jpg"])
def test_too_small(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "MIN_SIDE", H + 1)
    path = makers()[suffix](tmp_path) if suffix != ".jpg" else write(tmp_path / "a.jpg", GREY)
    with pytest.raises(ImageError, match="60 x 40 px is too small: a side needs 41 px"):
        open_image(path)


def test_smallest_that_is_read(tmp_path: Path) -> None:
    assert single(write(tmp_path / "a.png", GREY[:32, :33])).pixels.shape == (32, 33)
    with pytest.raises(ImageError, match="33 x 31 px is too small"):
        open_image(write(tmp_path / "a.png", GREY[:31, :33]))


def test_limits_of_a_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "MAX_WHOLE_BYTES", STACK.nbytes - 1)
    with pytest.raises(ImageError, match=r"save them as \.mha"):
        open_image(save(tmp_path / "a.nrrd", STACK))
    assert_stack(save(tmp_path / "a.mha", STACK), STACK)
    monkeypatch.setattr(image_module, "MAX_FRAMES", 4)
    with pytest.raises(ImageError, match="has 5 frames, more than 4"):
        open_image(tmp_path / "a.mha")


# ---- Memory


@pytest.mark.parametrize("suffix", [".mha", ".nii", ".tif"])
def test_frames_are_lazy(tmp_path: Path, suffix: str) -> None:
    stack = np.random.default_rng(0).integers(0, 256, (200, 4 * H, 3 * W), dtype=np.uint8)
    path = tmp_path / f"a{suffix}"
    if suffix == ".tif":
        assert cv2.imwritemulti(str(path), list(stack))
    else:
        save(path, stack)
    open_image(path)  # whatever is imported late
    tracemalloc.start()
    for k, frame in enumerate(open_image(path).frames()):
        assert np.array_equal(frame.pixels, stack[k])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert k == 199
    assert peak < 12 * stack[0].nbytes


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
@pytest.mark.parametrize("spacing", [b"0 0.5 1", b"-2 0.5 1", b"nan 0.5 1", b"0.5 inf 1", b"a b c"])
def test_spacing_that_cannot_be(tmp_path: Path, suffix: str, spacing: bytes) -> None:
    path = save(tmp_path / f"a{suffix}", STACK)
    edit(path, b"ElementSpacing = 1 1 1", b"ElementSpacing = " + spacing)
    assert_stack(path, STACK)
    frame = next(open_image(path).frames())
    assert frame.geometry.spacing_mm is None
    assert "cannot be: lengths are in px only" in frame.warnings[0]
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
    assert "not turned" in frame.warnings[0]


def test_resolution_of_pictures_is_not_trusted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", GREY, cv2.IMWRITE_TIFF_XDPI, 200, cv2.IMWRITE_TIFF_YDPI, 100)
    assert single(path).geometry == Geometry()


# ---- DICOM


def test_dicom_frames(tmp_path: Path) -> None:
    np.testing.assert_array_equal(single(dicom(tmp_path / "a.dcm", GREY[None])).pixels, GREY)
    assert_stack(dicom(tmp_path / "a.dcm", STACK), STACK)
    assert_stack(dicom(tmp_path / "a.dcm", STACK, preamble=False), STACK)


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    frame = single(dicom(tmp_path / "a.dcm", GREY[None], colours="MONOCHROME1"))
    np.testing.assert_array_equal(frame.pixels, 255 - GREY)
    wide = GREY.astype(np.uint16) * 16
    frame = single(dicom(tmp_path / "a.dcm", wide[None], colours="MONOCHROME1"))
    np.testing.assert_allclose(frame.pixels, 255 - stretched(wide), atol=1e-4)


@pytest.mark.parametrize("colours", ["RGB", "YBR_FULL"])
def test_dicom_colours(tmp_path: Path, colours: str) -> None:
    stored = RGB if colours == "RGB" else cv2.cvtColor(RGB, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
    frame = single(dicom(tmp_path / "a.dcm", stored[None], colours=colours))
    expected = cv2.cvtColor(RGB, cv2.COLOR_RGB2GRAY).astype(int)
    assert np.abs(frame.pixels - expected).max() <= 1


def test_dicom_of_jpeg_frames(tmp_path: Path) -> None:
    planes = [RGB, RGB[::-1], RGB[:, ::-1]]
    parts = [
        cv2.imencode(".jpg", plane[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])[1].tobytes()
        for plane in planes
    ]
    path = dicom(tmp_path / "a.dcm", np.stack(planes), colours="YBR_FULL_422", jpeg=parts)
    for frame, plane in zip(frames(path), planes, strict=True):
        expected = cv2.cvtColor(np.ascontiguousarray(plane), cv2.COLOR_RGB2GRAY).astype(int)
        assert np.abs(frame.pixels - expected).max() <= 4


def test_dicom_spacing(tmp_path: Path) -> None:
    def spacing(**tags: object) -> tuple[float, float] | None:
        return single(dicom(tmp_path / "a.dcm", GREY[None], **tags)).geometry.spacing_mm

    assert spacing() is None
    assert spacing(spacing="0.5\\0.25") == (0.25, 0.5)  # the tag gives rows first
    assert spacing(spacing="1\\1") == (1.0, 1.0)
    assert spacing(regions=region(0.02, 0.03)) == pytest.approx((0.2, 0.3))
    assert spacing(regions=region(0.02, 0.03) * 2) == pytest.approx((0.2, 0.3))
    assert spacing(regions=region(0.1, 0.1, unit=4) + region(0.02, 0.03)) == pytest.approx(
        (0.2, 0.3)
    )
    assert spacing(regions=region(0.02, 0.03) + region(0.04, 0.03)) is None
    assert spacing(regions=region(0.02, 0.03, unit=4)) is None
    assert spacing(regions=region(0.02, 0.03), spacing="0.5\\0.25") == (0.25, 0.5)


@pytest.mark.parametrize("spacing", ["0\\0", "abc", "-1\\1"])
def test_dicom_spacing_that_cannot_be(tmp_path: Path, spacing: str) -> None:
    path = dicom(tmp_path / "a.dcm", STACK, spacing=spacing)
    assert_stack(path, STACK)
    frame = next(open_image(path).frames())
    assert frame.geometry.spacing_mm is None and "cannot be" in frame.warnings[0]


def test_folder_of_dicom_files(tmp_path: Path) -> None:
    for name, number in (("a", 10), ("b", 9), ("c", 2), ("d", 9)):
        plane = STACK["cbda".index(name)]
        dicom(tmp_path / name, plane[None], number=number, spacing=f"{number}\\1")
    (tmp_path / "notes.txt").write_text("not a frame")
    dicom(tmp_path / "DICOMDIR", STACK[4:])
    assert_stack(tmp_path, STACK[:4])
    source = open_image(tmp_path)
    assert source.geometry.spacing_mm == (1.0, 2.0)
    assert [frame.geometry.spacing_mm[1] for frame in source.frames()] == [2, 9, 9, 10]
    assert [frame.slice_index for frame in source.frames()] == [0] * 4


def test_folder_with_a_damaged_file(tmp_path: Path) -> None:
    for k in range(3):
        dicom(tmp_path / f"{k}.dcm", STACK[k][None], number=k)
    path = dicom(tmp_path / "0.dcm", STACK[0][None], number=0)
    path.write_bytes(path.read_bytes()[:-500])
    first, second, bad = frames(tmp_path)
    np.testing.assert_array_equal(first.pixels, STACK[1])
    np.testing.assert_array_equal(second.pixels, STACK[2])
    assert "DICOM data is damaged" in bad.reason
    source = open_image(tmp_path)
    assert (source.width, source.height) == (W, H)


def test_folders_of_one_none_and_only_damaged(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="holds no DICOM file"):
        open_image(tmp_path)
    dicom(tmp_path / "a", GREY[None])
    np.testing.assert_array_equal(single(tmp_path).pixels, GREY)
    (tmp_path / "a").unlink()
    for name in ("b.dcm", "c.dcm"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ImageError, match="empty"):
        open_image(tmp_path)


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
