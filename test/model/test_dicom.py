"""DICOM: every encoding of pixels, what the values mean, and damaged frames."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import SimpleITK as sitk
from pydicom.encaps import encapsulate

from model.images import limits
from model.images.source import GreyFrame, ImageError, open_image
from test.model.test_odd_kinds import dicom as by_pydicom
from test.model.test_odd_kinds import palette, words
from test.support.image_files import (
    BIG,
    GREY,
    IMPLICIT,
    LITTLE,
    RGB,
    STACK,
    H,
    W,
    assert_stack,
    dicom,
    edit,
    element,
    frames,
    single,
    stretched,
)

pytestmark = pytest.mark.filterwarnings("error")
LUMINANCE = cv2.cvtColor(RGB, cv2.COLOR_RGB2GRAY)
WIDE, SIGNED = GREY.astype(np.uint16) * 16, GREY.astype(np.int16) * 4 - 500
COLOURS = [RGB, np.ascontiguousarray(RGB[::-1]), 255 - RGB]
CODES = pytest.mark.parametrize("code", [LITTLE, IMPLICIT, BIG], ids=["little", "implicit", "big"])


def assert_near(pixels: np.ndarray, rgb: np.ndarray, at_most: float) -> None:
    expected = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY) if rgb.ndim == 3 else rgb
    assert np.abs(pixels - expected.astype(int)).max() <= at_most


# ---- Ways to write pixels


@CODES
def test_native_pixels(tmp_path: Path, code: tuple[str, bool]) -> None:
    for preamble in (True, False):
        path = dicom(tmp_path / "a.dcm", GREY[None], code=code, preamble=preamble)
        np.testing.assert_array_equal(single(path).pixels, GREY)
        assert_stack(dicom(path, STACK, code=code, preamble=preamble), STACK)
        path = dicom(path, RGB[None], colours="RGB", code=code, preamble=preamble)
        np.testing.assert_array_equal(single(path).pixels, LUMINANCE)
        wide = STACK.astype(np.uint16) * 200
        path = dicom(path, wide, code=code, preamble=preamble)
        for frame, plane in zip(frames(path), wide, strict=True):
            np.testing.assert_allclose(frame.pixels, stretched(plane), atol=1e-4)


def test_header_that_tells_a_wrong_syntax(tmp_path: Path) -> None:
    """The elements themselves show their encoding."""
    assert_stack(dicom(tmp_path / "a.dcm", STACK, code=IMPLICIT, syntax=".1"), STACK)
    assert_stack(dicom(tmp_path / "a.dcm", STACK, code=BIG, syntax=".1"), STACK)


def deflate(path: Path) -> Path:
    data = path.read_bytes()
    start = data.index(element(0x00080016, "UI", "1.2.840.10008.5.1.4.1.1.3.1"))
    pack = zlib.compressobj(wbits=-15)
    path.write_bytes(data[:start] + pack.compress(data[start:]) + pack.flush())
    return path


def test_deflated(tmp_path: Path) -> None:
    path = deflate(dicom(tmp_path / "a.dcm", STACK, syntax=".1.99", spacing="0.5\\0.25"))
    assert_stack(path, STACK)
    assert open_image(path).geometry.spacing_mm == (0.25, 0.5)
    path.write_bytes(path.read_bytes()[: -H * W])
    items = frames(path)
    assert isinstance(items[0], GreyFrame) and "is damaged" in items[-1].reason
    path.write_bytes(path.read_bytes()[:300] + b"\xff" * 3000)
    with pytest.raises(ImageError, match="DICOM data is damaged"):
        open_image(path)


def jpeg(rgb: np.ndarray, *options: int) -> bytes:
    options = cv2.IMWRITE_JPEG_QUALITY, 98, *options
    return cv2.imencode(".jpg", rgb[..., ::-1] if rgb.ndim == 3 else rgb, options)[1].tobytes()


def jpeg_2000(rgb: np.ndarray, rate: int) -> bytes:
    options = cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, rate
    file = cv2.imencode(".jp2", rgb[..., ::-1] if rgb.ndim == 3 else rgb, options)[1].tobytes()
    return file[file.index(b"\xff\x4f\xff\x51") :]


def by_gdcm(array: np.ndarray, compressor: str, folder: Path) -> bytes:
    """One frame compressed without loss, as JPEG or as JPEG2000."""
    path = folder / "by_gdcm.dcm"
    image = sitk.GetImageFromArray(array, isVector=array.ndim == 3)
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.SetCompressor(compressor)
    writer.UseCompressionOn()
    writer.SetFileName(str(path))
    writer.Execute(image)
    packed = path.read_bytes().rpartition(struct.pack("<HHII", 0xFFFE, 0xE000, 0, 0xE000FFFE))[2]
    (length,) = struct.unpack_from("<I", packed)
    path.unlink()
    return packed[4 : 4 + length]


def rle(array: np.ndarray) -> bytes:
    """(H, W[, 3]): the planes of the higher bytes first, in runs of one kind or the other."""
    planes = np.ascontiguousarray(array).astype(array.dtype.newbyteorder(">")).view(np.uint8)
    planes = planes.reshape(H * W, -1).T
    segments = []
    for plane in planes:
        data, at = b"", 0
        while at < len(plane):
            run = plane[at : at + 128]
            if len(set(run.tolist())) == 1 and len(run) > 1:
                data += bytes([257 - len(run), run[0]])
            else:
                data += bytes([len(run) - 1]) + run.tobytes()
            at += len(run)
        segments.append(data + b"\0" * (len(data) % 2))
    starts = [64 + sum(map(len, segments[:k])) for k in range(len(segments))]
    return struct.pack("<16I", len(segments), *starts, *[0] * (15 - len(starts))) + b"".join(
        segments
    )


@pytest.mark.parametrize("syntax", [".4.50", ".4.51"])
@pytest.mark.parametrize("colours", ["YBR_FULL_422", "YBR_FULL", "MONOCHROME2"])
def test_jpeg(tmp_path: Path, syntax: str, colours: str) -> None:
    planes = [
        cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY) if colours[0] == "M" else rgb for rgb in COLOURS
    ]
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    parts = [jpeg(plane, *sampling * (colours == "YBR_FULL")) for plane in planes]
    path = dicom(tmp_path / "a.dcm", np.stack(planes), colours, jpeg=parts, syntax=syntax)
    for frame, plane in zip(frames(path), planes, strict=True):
        assert_near(frame.pixels, plane, 4)
    assert_near(single(dicom(path, planes[0][None], colours, jpeg=parts[:1])).pixels, planes[0], 4)


@pytest.mark.parametrize("array", [GREY, GREY.astype(np.uint16) * 16, RGB], ids=["8", "16", "rgb"])
@pytest.mark.parametrize("syntax", [".4.57", ".4.70", ".4.90", ".5"])
def test_packed_without_loss(tmp_path: Path, syntax: str, array: np.ndarray) -> None:
    planes = [array, np.ascontiguousarray(array[::-1]), np.ascontiguousarray(array[:, ::-1])]
    if syntax == ".5":
        parts = [rle(plane) for plane in planes]
    else:
        kind = "JPEG2000" if syntax == ".4.90" else "JPEG"
        parts = [by_gdcm(plane, kind, tmp_path) for plane in planes]
    colours = "RGB" if array.ndim == 3 else "MONOCHROME2"
    path = dicom(tmp_path / "a.dcm", np.stack(planes), colours, jpeg=parts, syntax=syntax)
    for frame, plane in zip(frames(path), planes, strict=True):
        expected = stretched(plane) if plane.dtype != np.uint8 else plane
        assert_near(frame.pixels, expected if plane.ndim == 2 else plane, 1e-4)
    path = dicom(path, array[None], colours, jpeg=parts[:1], syntax=syntax)
    assert_near(single(path).pixels, stretched(array) if array.dtype == np.uint16 else array, 1e-4)


@pytest.mark.parametrize(
    ("syntax", "colours", "rate", "at_most"),
    [(".4.90", "YBR_RCT", 1000, 0), (".4.91", "YBR_ICT", 400, 4), (".4.91", "MONOCHROME2", 400, 4)],
)
def test_jpeg_2000(tmp_path: Path, syntax: str, colours: str, rate: int, at_most: float) -> None:
    planes = [LUMINANCE, LUMINANCE[::-1].copy()] if colours[0] == "M" else COLOURS[:2]
    parts = [jpeg_2000(plane, rate) for plane in planes]
    path = dicom(tmp_path / "a.dcm", np.stack(planes), colours, jpeg=parts, syntax=syntax)
    for frame, plane in zip(frames(path), planes, strict=True):
        assert_near(frame.pixels, plane, at_most)


# Blocks of 20 x 20 px, without loss and within 2 grey levels.
JPEG_LS = {
    ".4.80": (
        "ffd8fff7000b080028003c01011100ffda0008010100000000ff6000002ed2bfff6000002edb6db6db6d"
        "b6db6f099decabf263f130fa987d4c3ea61f530fa987d4c3ea61f530fa987d4c3ea61f530fa987d4c3ea"
        "61f0009f695555555400000177aaaaaaaa70dbff7fe1c3c3ea61f530fa987d4c3ea61f530fa987d4c3ea"
        "61f530fa987d4c3ea61f530fa987d4c3ea61f530f8ffd9"
    ),
    ".4.81": (
        "ffd8fff7000b080028003c01011100ffda0008010100020000ff600077ff7f000001cf9f3e7e167f66bf"
        "263f130fa987d4c3ea61f530fa987d4c3ea61f530fa987d4c3ea61f530fa987d4c3ea61f003f3fff7000"
        "5fff7e23ff7fe10f0fa987d4c3ea61f530fa987d4c3ea61f530fa987d4c3ea61f530fa987d4c3ea61f53"
        "0fa987d4c3e0ffd9"
    ),
}


@pytest.mark.parametrize("syntax", JPEG_LS)
def test_jpeg_ls(tmp_path: Path, syntax: str) -> None:
    y, x = np.mgrid[:H, :W] // 20
    blocks = (60 * x + 100 * y).astype(np.uint8)
    part = bytes.fromhex(JPEG_LS[syntax])
    path = dicom(tmp_path / "a.dcm", np.stack([blocks] * 2), jpeg=[part] * 2, syntax=syntax)
    for frame in frames(path):
        assert_near(frame.pixels, blocks, 0 if syntax == ".4.80" else 2)


@pytest.mark.parametrize(
    ("syntax", "name"),
    [
        (".4.102", r"1\.2\.840\.10008\.1\.2\.4\.102 \(video\)"),
        (".4.107", r"\(video\)"),
        (".4.110", r"\(JPEG XL\)"),
        (".4.201", r"1\.2\.840\.10008\.1\.2\.4\.201 \(High-Throughput JPEG 2000\)"),
        (".4.92", r"1\.2\.840\.10008\.1\.2\.4\.92 cannot"),
        (".3.19700101", r"of the file cannot"),
    ],
)
def test_syntaxes_that_cannot_be_read_are_named(tmp_path: Path, syntax: str, name: str) -> None:
    path = dicom(tmp_path / "a.dcm", STACK, jpeg=[b"\0\0\0\1"], syntax=syntax)
    with pytest.raises(ImageError, match=name) as told:
        open_image(path)
    assert "gdcmconv --raw" in str(told.value) and "1970" not in str(told.value)


def test_deep_colours_in_rle(tmp_path: Path) -> None:
    wide = RGB.astype(np.uint16) * 200
    path = dicom(tmp_path / "a.dcm", wide[None], "RGB", jpeg=[rle(wide)], syntax=".5")
    luminance = wide @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(single(path).pixels, stretched(luminance), atol=0.01)


def test_packed_but_not_said_to_be(tmp_path: Path) -> None:
    path = dicom(tmp_path / "a.dcm", RGB[None], "RGB", jpeg=[jpeg(RGB)], syntax=".1")
    with pytest.raises(ImageError, match="DICOM data is damaged"):
        open_image(path)


def test_pixels_that_are_floats(tmp_path: Path) -> None:
    floats = {0x7FE00010: b"", 0x7FE00008: element(0x7FE00008, "OB", GREY.astype("f4").tobytes())}
    path = dicom(tmp_path / "a.dcm", GREY[None], more=floats)
    with pytest.raises(ImageError, match="pixels are floats"):
        open_image(path)


def test_what_holds_no_pixels(tmp_path: Path) -> None:
    path = dicom(tmp_path / "a.dcm", GREY[None], more={0x7FE00010: b""})
    with pytest.raises(ImageError, match="holds no pixels: it is not an image, or it was cut off"):
        open_image(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ImageError, match="is damaged"):
        open_image(path)
    for filling in (b"\0", b"\xff", b"DICM"):
        path.write_bytes(bytes(128) + b"DICM" + filling * 2**22)
        with pytest.raises(ImageError, match="is damaged"):
            open_image(path)


# ---- Frames of a loop


def cut(part: bytes) -> list[bytes]:
    third = len(part) // 6 * 2
    return [part[:third], part[third : 2 * third], part[2 * third :]]


@pytest.mark.parametrize("with_table", [True, False])
def test_frames_in_several_pieces(tmp_path: Path, with_table: bool) -> None:
    parts = [jpeg(rgb) + b"\0" * (len(jpeg(rgb)) % 2) for rgb in COLOURS]
    pieces = [cut(parts[0]), [parts[1]], cut(parts[2])]
    lengths = [sum(len(piece) + 8 for piece in of_frame) for of_frame in pieces]
    table = struct.pack("<3I", 0, lengths[0], lengths[0] + lengths[1]) if with_table else b""
    flat = [piece for of_frame in pieces for piece in of_frame]
    colours = "YBR_FULL_422"
    path = dicom(tmp_path / "a.dcm", np.stack(COLOURS), colours, jpeg=flat, table=table)
    for frame, rgb in zip(frames(path), COLOURS, strict=True):
        assert_near(frame.pixels, rgb, 4)
    path = dicom(tmp_path / "a.dcm", RGB[None], colours, jpeg=pieces[0])
    assert_near(single(path).pixels, RGB, 4)


def test_table_of_frames_counts_those_whose_beginning_is_damaged(tmp_path: Path) -> None:
    parts = [jpeg(rgb) + b"\0" * (len(jpeg(rgb)) % 2) for rgb in COLOURS]
    starts = [0, len(parts[0]) + 8, len(parts[0]) + len(parts[1]) + 16]
    pieces = [parts[0], bytes(100) + parts[1][100:], *cut(parts[2])]
    table = struct.pack("<3I", *starts)
    stack = np.stack(COLOURS)
    path = dicom(tmp_path / "a.dcm", stack, "YBR_FULL_422", jpeg=pieces, table=table)
    first, second, third = frames(path)
    assert_near(first.pixels, COLOURS[0], 4)
    assert "DICOM data is damaged" in second.reason
    assert_near(third.pixels, COLOURS[2], 4)


@pytest.mark.parametrize("make", [jpeg, lambda rgb: jpeg_2000(rgb, 1000), rle])
def test_damaged_frames_cost_no_other(tmp_path: Path, make: Callable) -> None:
    syntax = {jpeg: ".4.50", rle: ".5"}.get(make, ".4.90")
    colours = {jpeg: "YBR_FULL_422", rle: "RGB"}.get(make, "YBR_RCT")
    planes = [*COLOURS, RGB, RGB]
    parts = [make(rgb) for rgb in planes]
    parts[0] = b"\xff" * len(parts[0])
    parts[2] = bytes(100) + parts[2][100:]
    path = dicom(tmp_path / "a.dcm", np.stack(planes), colours, jpeg=parts, syntax=syntax)
    path.write_bytes(path.read_bytes()[:-100])
    items = frames(path)
    assert [isinstance(item, GreyFrame) for item in items] == [False, True, False, True, False]
    for k in (1, 3):
        assert_near(items[k].pixels, planes[k], 4)
    for k in (0, 2, 4):
        assert "DICOM data is damaged" in items[k].reason


def test_damage_that_would_end_the_process(tmp_path: Path) -> None:
    """GDCM divides by RLE's number of segments, and allocates the bits that a JPEG value claims."""
    wide = GREY.astype(np.uint16) * 16
    lossless = by_gdcm(wide, "JPEG", tmp_path)
    at = lossless.index(b"\xff\xc3\0\x0b\x10") + 4
    claims = lossless[:at] + b"\x80" + lossless[at + 1 :]
    for part, syntax in ((bytes(4) + rle(wide)[4:], ".5"), (claims, ".4.70"), (claims, ".4.57")):
        path = dicom(tmp_path / "a.dcm", wide[None], jpeg=[part], syntax=syntax)
        with pytest.raises(ImageError, match="DICOM data is damaged"):
            open_image(path)


@pytest.mark.parametrize("tag", [0x00280010, 0x00280011])
def test_jpeg_of_another_size_than_the_header_says(tmp_path: Path, tag: int) -> None:
    more = {tag: element(tag, "US", 50)}
    path = dicom(tmp_path / "a.dcm", RGB[None], "YBR_FULL_422", jpeg=[jpeg(RGB)], more=more)
    with pytest.raises(ImageError, match="DICOM data is damaged"):
        open_image(path)


def test_libraries_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    part = jpeg_2000(RGB, 1000)
    for packed in (part[: len(part) // 2], part[:60] + bytes(40) + part[100:]):
        path = dicom(tmp_path / "a.dcm", RGB[None], "YBR_RCT", jpeg=[packed], syntax=".4.90")
        with pytest.raises(ImageError, match="DICOM data is damaged"):
            open_image(path)
    assert capfd.readouterr() == ("", "")


def test_native_pixels_that_are_cut_off(tmp_path: Path) -> None:
    """ITK would fill them up with zeros."""
    path = dicom(tmp_path / "a.dcm", STACK)
    path.write_bytes(path.read_bytes()[: -H * W - 1])
    items = frames(path)
    assert [isinstance(item, GreyFrame) for item in items] == [True] * 3 + [False] * 2
    np.testing.assert_array_equal(items[2].pixels, STACK[2])
    path = dicom(tmp_path / "a.dcm", GREY[None])
    edit(path, *(element(0x00280010, "US", rows) for rows in (H, 80)))
    with pytest.raises(ImageError, match="DICOM data is damaged"):
        open_image(path)


def test_loop_that_vanishes_while_it_is_read(tmp_path: Path) -> None:
    path = dicom(tmp_path / "a.dcm", STACK)
    items = open_image(path).frames()
    assert isinstance(next(items), GreyFrame)
    path.unlink()
    assert ["No such file" in item.reason for item in items] == [True] * 4


def test_loops_larger_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_BYTES", STACK.nbytes - 1)
    assert_stack(dicom(tmp_path / "a.dcm", STACK), STACK)
    with pytest.raises(ImageError, match="fewer bytes per pixel"):
        open_image(dicom(tmp_path / "a.dcm", np.tile(GREY, (3, 2))[None]))
    long = jpeg(RGB) + bytes(STACK.nbytes)
    with pytest.raises(ImageError, match="fewer bytes per pixel"):
        open_image(dicom(tmp_path / "a.dcm", RGB[None], "YBR_FULL_422", jpeg=[long]))


# ---- What the values mean


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    assert_stack(dicom(path, STACK, "MONOCHROME1"), 255 - STACK)
    for wide in (STACK.astype(np.uint16) * 16, STACK.astype(np.int16) * 16 - 1000):
        for frame, plane in zip(frames(dicom(path, wide, "MONOCHROME1")), wide, strict=True):
            np.testing.assert_allclose(frame.pixels, 255 - stretched(plane), atol=1e-4)
    part = by_gdcm(GREY, "JPEG", tmp_path)
    packed = dicom(path, GREY[None], "MONOCHROME1", jpeg=[part], syntax=".4.70")
    np.testing.assert_array_equal(single(packed).pixels, 255 - GREY)


@pytest.mark.parametrize("by_plane", [False, True])
@pytest.mark.parametrize("colours", ["RGB", "YBR_FULL"])
def test_colours(tmp_path: Path, colours: str, by_plane: bool) -> None:
    planes = COLOURS
    if colours == "YBR_FULL":
        planes = [cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]] for rgb in COLOURS]
    stack = np.stack(planes)
    more = {0x00280006: element(0x00280006, "US", int(by_plane))}
    pixels = np.moveaxis(stack, 3, 1) if by_plane else stack
    more[0x7FE00010] = element(0x7FE00010, "OB", pixels.tobytes())
    for frame, rgb in zip(
        frames(dicom(tmp_path / "a.dcm", stack, colours, more=more)), COLOURS, strict=True
    ):
        assert_near(frame.pixels, rgb, 1)


def test_colours_shared_by_two_pixels(tmp_path: Path) -> None:
    """YBR_FULL_422 without compression: Y Y Cb Cr."""
    stored = []
    for rgb in COLOURS:
        luma, red, blue = (
            part.ravel() for part in cv2.split(cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb))
        )
        stored.append(np.column_stack([luma[::2], luma[1::2], blue[::2], red[::2]]))
    more = {0x7FE00010: element(0x7FE00010, "OB", np.stack(stored).tobytes())}
    path = dicom(tmp_path / "a.dcm", np.stack(COLOURS), "YBR_FULL_422", more=more)
    for frame, rgb in zip(frames(path), COLOURS, strict=True):
        assert_near(frame.pixels, rgb, 3)


@pytest.mark.parametrize("bits", [8, 16])
@CODES
def test_palette(tmp_path: Path, bits: int, code: tuple[str, bool]) -> None:
    ramps = [np.arange(256), 255 - np.arange(256), np.arange(256) // 2]
    if bits == 16:
        ramps = [ramp * 257 for ramp in ramps]
    more = {}
    for k, ramp in enumerate(ramps):
        values = ramp.astype("u1" if bits == 8 else code[0] + "u2").tobytes()
        descriptor = struct.pack(code[0] + "3H", 256, 0, bits)
        more[0x00281101 + k] = element(0x00281101 + k, "US", descriptor, code)
        more[0x00281201 + k] = element(0x00281201 + k, "OW", values, code)
    path = dicom(tmp_path / "a.dcm", STACK, "PALETTE COLOR", code=code, more=more)
    for frame, plane in zip(frames(path), STACK, strict=True):
        rgb = np.dstack([plane, 255 - plane, plane // 2])
        expected = rgb @ np.array([0.299, 0.587, 0.114])
        np.testing.assert_allclose(frame.pixels, expected, atol=1.5)


@CODES
def test_bits_signs_and_rescaling(tmp_path: Path, code: tuple[str, bool]) -> None:
    path = tmp_path / "a.dcm"

    def check(stored: np.ndarray, expected: np.ndarray, **more: tuple[str, str | int]) -> None:
        tags = {int(tag, 16): element(int(tag, 16), *at, code) for tag, at in more.items()}
        frame = single(dicom(path, stored[None], code=code, more=tags))
        np.testing.assert_allclose(frame.pixels, expected, atol=1e-3)

    wide = GREY.astype(np.uint16) * 16
    twelve = {"0x00280101": ("US", 12), "0x00280102": ("US", 11)}
    check(wide, stretched(wide), **twelve)
    check(wide | 0xA000, stretched(wide), **twelve)  # old files have drawings in the higher bits
    signed = GREY.astype(np.int16) * 4 - 500
    check(signed, stretched(signed))
    slope = {"0x00281053": ("DS", "-0.5"), "0x00281052": ("DS", "1000")}
    check(wide, 255 - stretched(wide), **slope)
    check(GREY, GREY, **{"0x00281053": ("DS", "1"), "0x00281052": ("DS", "0")})
    window = {"0x00281050": ("DS", "128"), "0x00281051": ("DS", "10")}
    check(GREY, GREY, **window)
    check(GREY, GREY, **{"0x00281053": ("DS", "0"), "0x00281052": ("DS", "0")})


# ---- Headers that contradict the data, written by pydicom


def expected_grey(array: np.ndarray) -> np.ndarray:
    return stretched(array) if array.dtype.itemsize > 1 else array


@pytest.mark.parametrize(
    ("array", "syntax", "elements"),
    [
        (RGB, ".4.70", {"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2"}),
        (RGB, ".4.90", {"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2"}),
        (GREY, ".4.70", {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}),
        (GREY, ".4.90", {"SamplesPerPixel": 3, "PhotometricInterpretation": "YBR_RCT"}),
        (WIDE, ".4.70", {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}),
        (WIDE, ".4.90", {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}),
        (SIGNED, ".4.90", {"PixelRepresentation": 0}),
    ],
    ids=[
        *("colours in lossless JPEG", "colours in JPEG 2000"),
        *("grey in lossless JPEG", "grey in JPEG 2000"),
        *("16 bits in lossless JPEG", "16 bits in JPEG 2000", "signs in JPEG 2000"),
    ],
)
@pytest.mark.parametrize("is_right_syntax", [True, False])
def test_packed_data_tell_their_form(
    tmp_path: Path, array: np.ndarray, syntax: str, elements: dict, is_right_syntax: bool
) -> None:
    part = by_gdcm(array, "JPEG" if syntax == ".4.70" else "JPEG2000", tmp_path)
    if not is_right_syntax:
        syntax = {".4.70": ".4.90", ".4.90": ".4.80"}[syntax]
    packed = encapsulate([part])
    path = by_pydicom(
        tmp_path / "a.dcm", array, "1.2" + syntax, **{**elements, "PixelData": packed}
    )
    assert_near(single(path).pixels, expected_grey(array), 1e-4)


def test_lossless_data_of_fewer_bits_are_inverted_within_them(tmp_path: Path) -> None:
    packed = encapsulate([by_gdcm(GREY, "JPEG", tmp_path)])
    elements = {"BitsStored": 12, "HighBit": 11, "PhotometricInterpretation": "MONOCHROME1"}
    path = by_pydicom(tmp_path / "a.dcm", WIDE, "1.2.4.70", PixelData=packed, **elements)
    np.testing.assert_array_equal(single(path).pixels, 255 - GREY)


@pytest.mark.parametrize("colours", ["MONOCHROME2", "RGB"])
def test_grey_data_under_three_samples(tmp_path: Path, colours: str) -> None:
    elements = {"SamplesPerPixel": 3, "PhotometricInterpretation": colours}
    path = by_pydicom(tmp_path / "a.dcm", GREY, PlanarConfiguration=0, **elements)
    np.testing.assert_array_equal(single(path).pixels, GREY)
    path = by_pydicom(path, GREY, NumberOfFrames=3, PixelData=STACK[:3].tobytes(), **elements)
    if colours == "MONOCHROME2":
        assert_stack(path, STACK[:3])
        return
    with pytest.raises(ImageError, match="7200 bytes of pixels, but its header describes 21600"):
        open_image(path)


@pytest.mark.parametrize(
    "elements",
    [
        {"PhotometricInterpretation": "YBR_FULL_422", "PixelData": bytes(H * W * 5 // 2)},
        {"SamplesPerPixel": 4, "PhotometricInterpretation": "CMYK"},
        {"BitsAllocated": 64},
    ],
    ids=["422 of another length", "CMYK", "64 bits"],
)
def test_pixels_of_a_form_that_is_not_read(tmp_path: Path, elements: dict) -> None:
    with pytest.raises(ImageError, match=r"header describes|has 4 values|takes 64 bits"):
        open_image(by_pydicom(tmp_path / "a.dcm", RGB, **elements))


@pytest.mark.parametrize("is_inverted", [False, True])
def test_pixels_of_one_bit(tmp_path: Path, is_inverted: bool) -> None:
    packed = np.packbits(GREY > 99, bitorder="little").tobytes()
    colours = "MONOCHROME1" if is_inverted else "MONOCHROME2"
    bits = {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}
    path = by_pydicom(
        tmp_path / "a.dcm", GREY, PixelData=packed, PhotometricInterpretation=colours, **bits
    )
    np.testing.assert_array_equal(single(path).pixels, np.uint8(255) * ((GREY > 99) ^ is_inverted))


def test_two_pixels_in_three_bytes(tmp_path: Path) -> None:
    digits = "".join(f"{n:03x}"[::-1] for n in WIDE.ravel())  # hexadecimal, the lowest first
    packed = bytes(int(digits[k : k + 2][::-1], 16) for k in range(0, len(digits), 2))
    bits = {"BitsAllocated": 12, "BitsStored": 12, "HighBit": 11}
    path = by_pydicom(tmp_path / "a.dcm", WIDE, PixelData=packed, **bits)
    np.testing.assert_allclose(single(path).pixels, stretched(WIDE), atol=1e-4)


def test_colours_of_16_bits(tmp_path: Path) -> None:
    wide = RGB.astype(np.uint16) * 256
    luminance = wide @ np.array([0.299, 0.587, 0.114])
    blue, red = (2**15 + (wide[..., k] - luminance) / d for k, d in ((2, 1.772), (0, 1.402)))
    ycc = np.dstack([luminance, blue, red]).round().astype(np.uint16)
    for colours, pixels in (("YBR_FULL", ycc), ("RGB", wide)):
        path = by_pydicom(tmp_path / "a.dcm", pixels, PhotometricInterpretation=colours)
        np.testing.assert_allclose(single(path).pixels, stretched(luminance), atol=0.1)


@pytest.mark.parametrize("colours", ["YBR_RCT", "YBR_ICT"])
def test_jpeg_2000_that_was_unpacked_under_its_old_name(tmp_path: Path, colours: str) -> None:
    path = by_pydicom(tmp_path / "a.dcm", RGB, PhotometricInterpretation=colours)
    np.testing.assert_array_equal(single(path).pixels, LUMINANCE)


def test_palette_of_few_bits(tmp_path: Path) -> None:
    """Entries of 12 bits in 16 keep their levels."""
    elements = palette(256, 0, 16, lambda entries: words(entries * 16))
    path = by_pydicom(tmp_path / "a.dcm", GREY, **elements)
    np.testing.assert_allclose(single(path).pixels, stretched(GREY), atol=1e-4)


@pytest.mark.parametrize("order", ["<", ">"])
def test_palette_in_segments(tmp_path: Path, order: str) -> None:
    """One entry, then a line to the last."""
    segments = struct.pack(order + "6H", 0, 1, 0, 1, 255, 65535)
    elements: dict[str, object] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in ("Red", "Green", "Blue"):
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        elements[f"Segmented{colour}PaletteColorLookupTableData"] = segments
    elements["PixelData"] = GREY.view("<u2").astype(order + "u2").tobytes()  # OW: words
    syntax = "1.2.1" if order == "<" else "1.2.2"
    path = by_pydicom(tmp_path / "a.dcm", GREY, syntax, **elements)
    np.testing.assert_array_equal(single(path).pixels, GREY)


def test_overlays_in_runs(tmp_path: Path) -> None:
    overlay = np.indices(GREY.shape).sum(0).astype(np.uint16) % 16 << 12
    packed = encapsulate([rle(WIDE | overlay)])
    bits = {"BitsStored": 12, "HighBit": 11}
    path = by_pydicom(tmp_path / "a.dcm", WIDE, "1.2.5", PixelData=packed, **bits)
    np.testing.assert_allclose(single(path).pixels, stretched(WIDE), atol=1e-4)


# ---- Folders


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


def test_folder_of_loops_and_single_frames(tmp_path: Path) -> None:
    """Files without a valid InstanceNumber come last, by name."""
    dicom(tmp_path / "a", STACK[4:], more={0x00200013: element(0x00200013, "IS", "first")})
    dicom(tmp_path / "b", STACK[1:3], number=7)
    dicom(tmp_path / "c", STACK[:1], number=3)
    dicom(tmp_path / "d", STACK[3:4], number=8)
    dicom(tmp_path / "e", GREY[None])
    assert_stack(tmp_path, np.concatenate([STACK, GREY[None]]))
    assert [frame.slice_index for frame in open_image(tmp_path).frames()] == [0, 0, 1, 0, 0, 0]


def test_folder_with_damaged_files(tmp_path: Path) -> None:
    """A file whose header can be read keeps its place."""
    for k in range(4):
        dicom(tmp_path / f"{k}.dcm", STACK[k][None], number=k)
    for k, length in ((0, 200), (2, -500)):
        path = tmp_path / f"{k}.dcm"
        path.write_bytes(path.read_bytes()[:length])
    first, bad, third, last = frames(tmp_path)
    np.testing.assert_array_equal(first.pixels, STACK[1])
    np.testing.assert_array_equal(third.pixels, STACK[3])
    assert "DICOM data is damaged" in bad.reason and "DICOM data is damaged" in last.reason
    source = open_image(tmp_path)
    assert (source.width, source.height) == (W, H)


def test_folders_of_one_none_and_only_damaged(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="holds 0 images: expected one, or DICOM files"):
        open_image(tmp_path)
    dicom(tmp_path / "a", GREY[None])
    np.testing.assert_array_equal(single(tmp_path).pixels, GREY)
    (tmp_path / "a").unlink()
    for name in ("b.dcm", "c.dcm"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ImageError, match="empty"):
        open_image(tmp_path)
