"""TIFF files of every kind, written by tifffile, Pillow and OpenCV, or by hand where none can."""

import re
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from model.images.grey import to_grey
from model.images.limits import UPRIGHT, ImageError, ImageFile
from model.images.source import GreyFrame
from model.images.tiff import open_tiff
from test.phantom import phantom
from test.support.image_files import STACK, frames, stretched, write

pillow = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("error")

W, H = 71, 45  # odd, so that a row or strip of bytes is odd as well
GREY = phantom(3, W, H).image
RGB = np.dstack([GREY, np.roll(GREY, 3, axis=0), 255 - GREY])
LUMA = RGB @ np.array([0.299, 0.587, 0.114])
ALPHA = np.linspace(0, 255, W).astype(np.uint8) * np.ones((H, 1), np.uint8)
PILLOW_PACKED = ("raw", "tiff_lzw", "packbits", "tiff_adobe_deflate", "tiff_deflate")


def read(path: Path, k: int = 0) -> np.ndarray:
    return to_grey(open_tiff(path).read(k))


def refused(path: Path) -> str:
    """The sentence that refuses a file, at its directories or at its first page."""
    with pytest.raises(ImageError) as caught:
        open_tiff(path).read(0)
    assert str(path.parent) not in str(caught.value)
    return str(caught.value)


def hand_made(path: Path, data: bytes, **tags: int) -> Path:
    """One strip of grey values; `tags` are named t259 and so on."""
    values = {256: W, 257: H, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: H, 279: len(data)}
    values |= {int(name[1:]): value for name, value in tags.items()}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, values[tag]) for tag in sorted(values))
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    path.write_bytes(head + data + struct.pack("<H", len(values)) + entries + bytes(4))
    return path


def overwrite(path: Path, tag: int, value: int) -> Path:
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags[tag].overwrite(value)
    return path


# ---- Depths and types


@pytest.mark.parametrize("white", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 10, 12, 14, 16])
def test_packed_values(tmp_path: Path, bits: int, white: bool) -> None:
    largest = 2**bits - 1
    values = GREY.astype(np.uint32) * largest // 255
    rows = [
        "".join(f"{v:0{bits}b}" for v in row) for row in (largest - values if white else values)
    ]
    rows = [row.ljust(-(-len(row) // 8) * 8, "0") for row in rows]
    data = b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    if bits == 16:
        data = np.frombuffer(data, ">u2").astype("<u2").tobytes()
    pixels = read(hand_made(tmp_path / "a.tif", data, t258=bits, t262=int(not white)))
    if bits <= 8:
        np.testing.assert_array_equal(pixels, values * 255 // largest)
    else:
        np.testing.assert_allclose(pixels, stretched(values), atol=1e-4)


@pytest.mark.parametrize("white", [False, True])
@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"])
def test_types(tmp_path: Path, kind: str, white: bool) -> None:
    low = {"i": -128, "u": 0, "f": -0.5}[kind[0]]
    values = (
        (GREY + float(low)).astype(kind) if kind[1] == "1" else (GREY * 100.0 + low).astype(kind)
    )
    expected = 255 - stretched(values) if white else stretched(values)
    photometric = "miniswhite" if white else "minisblack"
    for byteorder in "<>":
        for tile in (None, (32, 48)):
            tifffile.imwrite(
                tmp_path / "a.tif", values, photometric=photometric, byteorder=byteorder, tile=tile
            )
            if kind == "u1":
                np.testing.assert_array_equal(
                    read(tmp_path / "a.tif"), 255 - GREY if white else GREY
                )
            else:
                np.testing.assert_allclose(read(tmp_path / "a.tif"), expected, atol=1e-4)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("kind", ["u1", "u2", "i4", "u8", "f4", "f8"])
def test_colours(tmp_path: Path, kind: str, planar: str) -> None:
    values = RGB if kind == "u1" else (RGB * 100.0).astype(kind)
    expected = LUMA if kind == "u1" else stretched(LUMA)
    planes = values if planar == "contig" else np.moveaxis(values, -1, 0).copy()
    for byteorder in "<>":
        for how in ({"tile": (32, 48)}, {"rowsperstrip": 7}, {"compression": "zlib"}):
            tifffile.imwrite(
                tmp_path / "a.tif",
                planes,
                photometric="rgb",
                planarconfig=planar,
                byteorder=byteorder,
                **how,
            )
            atol = 0.51 if kind == "u1" else 1e-3
            np.testing.assert_allclose(read(tmp_path / "a.tif"), expected, atol=atol)


@pytest.mark.parametrize("bits, form", [(24, 1), (12, 2), (24, 3), (64, 5), (8, 9)])
def test_unknown_types(tmp_path: Path, bits: int, form: int) -> None:
    path = hand_made(tmp_path / "a.tif", bytes(range(256)) * 200, t258=bits, t339=form)
    assert f"{bits} bits and the sample format {form}: expected unsigned" in refused(path)


# ---- Compression


@pytest.mark.parametrize("packed", PILLOW_PACKED)
def test_packed_strips(tmp_path: Path, packed: str) -> None:
    path = tmp_path / "a.tif"
    for rows in (1, 7, H):
        pillow.fromarray(GREY).save(path, compression=packed, tiffinfo={278: rows})
        np.testing.assert_array_equal(read(path), GREY)
        pillow.fromarray(RGB).save(path, compression=packed, tiffinfo={278: rows})
        np.testing.assert_allclose(read(path), LUMA, atol=0.51)
        pillow.fromarray(GREY.astype(np.uint16) * 99).save(
            path, compression=packed, tiffinfo={278: rows}
        )
        np.testing.assert_allclose(read(path), stretched(GREY), atol=1e-4)


@pytest.mark.parametrize("packing", [5, 8, 32946, 32773])
@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "i4", "f4", "f8"])
def test_predictors(tmp_path: Path, packing: int, kind: str) -> None:
    values = RGB if kind == "u1" else (RGB * 100.0).astype(kind)
    expected = LUMA if kind == "u1" else stretched(LUMA)
    for predictor in (1, 2, 3) if kind[0] == "f" else (1, 2):
        path = write(
            tmp_path / "a.tif",
            values[..., ::-1],
            *(cv2.IMWRITE_TIFF_COMPRESSION, packing, cv2.IMWRITE_TIFF_PREDICTOR, predictor),
        )
        atol = 0.51 if kind == "u1" else 1e-3
        np.testing.assert_allclose(read(path), expected, atol=atol)


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_predictor_in_either_byte_order(tmp_path: Path, byteorder: str) -> None:
    values = GREY.astype(np.uint16) * 99
    tifffile.imwrite(
        tmp_path / "a.tif", values, compression="zlib", predictor=2, byteorder=byteorder
    )
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert tiff.pages[0].predictor == 2 and tiff.byteorder == byteorder
    np.testing.assert_allclose(read(tmp_path / "a.tif"), stretched(GREY), atol=1e-4)


def test_bits_in_reverse_order(tmp_path: Path) -> None:
    data = bytes(int(f"{value:08b}"[::-1], 2) for value in GREY.tobytes())
    np.testing.assert_array_equal(read(hand_made(tmp_path / "a.tif", data, t266=2)), GREY)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.tif"
    pillow.fromarray(GREY).convert("L").save(path, compression="jpeg", tiffinfo={278: 16})
    if mode == "RGB":
        smooth = cv2.GaussianBlur(RGB, (0, 0), 3)
        pillow.fromarray(smooth).save(path, compression="jpeg", tiffinfo={278: 16})
    with tifffile.TiffFile(path) as tiff:
        assert len(tiff.pages[0].dataoffsets) == 3 and tiff.pages[0].jpegtables
    expected = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2GRAY)
    np.testing.assert_array_equal(read(path), expected)


def test_jpeg_whose_later_half_is_lost(tmp_path: Path) -> None:
    jpeg = cv2.imencode(".jpg", GREY)[1].tobytes()
    path = hand_made(tmp_path / "a.tif", jpeg, t259=7)
    assert np.abs(read(path).astype(int) - GREY).mean() < 5
    hand_made(path, jpeg[: len(jpeg) // 2] + b"\xff\xd9", t259=7)
    assert "JPEG data is" in refused(path)
    assert "TIFF data is damaged" in refused(hand_made(path, jpeg, t259=7, t257=H + 1))
    assert "TIFF data is damaged" in refused(hand_made(path, jpeg, t259=7, t256=W - 1))


@pytest.mark.parametrize(
    "number, name",
    [
        (3, r"fax \(CCITT\)"),
        (6, "JPEG of the old style"),
        *((number, "JPEG 2000") for number in (33003, 33005, 34712)),
        *((34887, "LERC"), (50000, "ZSTD"), (50001, "WEBP"), (50002, "JPEGXL")),
        (999, "method 999"),
    ],
)
def test_other_compressions(tmp_path: Path, number: int, name: str) -> None:
    path = hand_made(tmp_path / "a.tif", GREY.tobytes(), t259=number)
    with pytest.raises(ImageError, match=f"compressed by {name}, which cannot be read: save it"):
        open_tiff(path).read(0)


# ---- Colours, transparency, padding


def test_palettes(tmp_path: Path) -> None:
    table = np.random.default_rng(0).integers(0, 2**16, (3, 256), dtype=np.uint16)
    for scaled in (table, table >> 8):  # some writers use only 8 of the 16 bits
        tifffile.imwrite(tmp_path / "a.tif", GREY, photometric="palette", colormap=scaled)
        expected = (table >> 8).T.astype(np.uint8)[GREY]
        np.testing.assert_array_equal(
            read(tmp_path / "a.tif"), cv2.cvtColor(expected, cv2.COLOR_RGB2GRAY)
        )
    few = pillow.fromarray(RGB).quantize(9)
    few.save(tmp_path / "a.tif")
    expected = np.asarray(few.convert("RGB"))
    np.testing.assert_array_equal(
        read(tmp_path / "a.tif"), cv2.cvtColor(expected, cv2.COLOR_RGB2GRAY)
    )


@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_transparency(tmp_path: Path, extra: int, kind: str) -> None:
    """Only colours that are not multiplied by it yet (2) are composed over black."""
    factor = {"u1": 1.0, "u2": 257.0, "f4": 1 / 255}[kind]
    opacity = ALPHA / 255 if extra == 2 else 1.0
    for colours, grey in ((RGB, LUMA * opacity), (GREY[..., None], GREY * opacity)):
        values = (np.dstack([colours, ALPHA]) * factor).astype(kind)
        photometric = "rgb" if colours.shape[2] == 3 else "minisblack"
        tifffile.imwrite(
            tmp_path / "a.tif",
            values,
            photometric=photometric,
            planarconfig="contig",
            extrasamples=[extra],
        )
        pixels = read(tmp_path / "a.tif")
        if kind == "u1":
            np.testing.assert_allclose(pixels, grey, atol=1)
        else:
            np.testing.assert_allclose(pixels, stretched(grey), atol=0.01)


def test_opaque_pixels_stay(tmp_path: Path) -> None:
    opaque = np.dstack([RGB, np.full_like(GREY, 255)])
    tifffile.imwrite(tmp_path / "a.tif", opaque, photometric="rgb", extrasamples=[2])
    np.testing.assert_array_equal(open_tiff(tmp_path / "a.tif").read(0), RGB)


def test_ycbcr(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    pillow.fromarray(RGB).convert("YCbCr").save(path)
    np.testing.assert_allclose(read(path), LUMA, atol=2)
    overwrite(path, 530, (2, 2))
    assert "YCbCr colours that are subsampled" in refused(path)


@pytest.mark.parametrize("number, name", [(5, "CMYK"), (8, "CIELAB"), (99, "kind 99")])
def test_other_colours(tmp_path: Path, number: int, name: str) -> None:
    path = hand_made(tmp_path / "a.tif", GREY.tobytes(), t262=number)
    assert f"has colours of the kind {name}, which cannot be read: save it in grey" in refused(path)


def test_more_values_than_colours(tmp_path: Path) -> None:
    values = np.dstack([RGB, RGB])
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", planarconfig="contig")
    assert "a pixel has 6 values: expected grey (1) or RGB (3)" in refused(tmp_path / "a.tif")
    pillow.fromarray(np.dstack([RGB, ALPHA])).save(tmp_path / "a.tif", compression="jpeg")
    assert "transparency within JPEG" in refused(tmp_path / "a.tif")


@pytest.mark.parametrize(
    "kind, nodata", [("u1", "0"), ("i2", "-9999"), ("f4", "-3.4028234663852886e+38"), ("f4", "nan")]
)
def test_padding_of_gdal(tmp_path: Path, kind: str, nodata: str) -> None:
    values = (GREY.astype(np.int16) + 10 if kind != "u1" else GREY // 2 + 10).astype(kind)
    outside = np.s_[:, : W // 3]
    values[outside] = float(nodata)
    tifffile.imwrite(tmp_path / "a.tif", values, extratags=[(42113, 2, 0, nodata, True)])
    pixels = read(tmp_path / "a.tif")
    assert (pixels[outside] == 0).all()
    inside = np.s_[:, W // 3 :]
    expected = values[inside] if kind != "f4" else stretched(values[inside])
    np.testing.assert_allclose(pixels[inside], expected, atol=1e-4 if kind == "f4" else 11)


# ---- Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("packed", ["raw", "tiff_lzw"])
def test_orientations(tmp_path: Path, orientation: int, packed: str) -> None:
    from PIL import ImageOps

    stored = pillow.fromarray(RGB)
    stored.getexif()[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(stored))
    pillow.fromarray(RGB).save(tmp_path / "a.tif", compression=packed, tiffinfo={274: orientation})
    file = open_tiff(tmp_path / "a.tif")
    np.testing.assert_array_equal(file.read(0), upright)
    assert file.size == upright.shape[1::-1]
    assert file.warnings == (() if orientation == 1 else (UPRIGHT,))


@pytest.mark.parametrize("unknown", [0, 9])
def test_unknown_orientation_is_ignored(tmp_path: Path, unknown: int) -> None:
    file = open_tiff(hand_made(tmp_path / "a.tif", GREY.tobytes(), t274=unknown))
    np.testing.assert_array_equal(file.read(0), GREY)
    assert file.warnings == ()


# ---- Pages


def test_pages_of_other_sizes(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    assert cv2.imwritemulti(str(path), [GREY, GREY[:, :50], GREY[:31]])
    file = open_tiff(path)
    assert (file.count, file.size, file.along_z, file.needed) == (3, (W, H), True, W * H)
    np.testing.assert_array_equal(file.read(0), GREY)
    np.testing.assert_array_equal(file.read(1), GREY[:, :50])
    with pytest.raises(ImageError, match=f"{W} x 31 px is too small"):
        file.read(2)


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_copies_and_masks_are_left_out(tmp_path: Path, byteorder: str, bigtiff: bool) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path, byteorder=byteorder, bigtiff=bigtiff) as tiff:
        tiff.write(GREY, metadata=None, subifds=1)
        tiff.write(GREY[::2, ::2], metadata=None, subfiletype=1)
        tiff.write(GREY[::2], metadata=None, subfiletype=1)
        tiff.write(GREY > 9, metadata=None, subfiletype=4)
        tiff.write(255 - GREY, metadata=None)
    file = open_tiff(path)
    assert file.count == 2
    np.testing.assert_array_equal(file.read(0), GREY)
    np.testing.assert_array_equal(file.read(1), 255 - GREY)
    tifffile.imwrite(path, GREY, subfiletype=1)
    assert "only smaller copies or masks" in refused(path)


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_stack_of_imagej_under_one_directory(tmp_path: Path, byteorder: str) -> None:
    path = tmp_path / "a.tif"
    stack = np.stack([np.roll(GREY, k, axis=1).astype(np.uint16) * 99 for k in range(4)])
    tifffile.imwrite(path, stack, imagej=True, truncate=True, byteorder=byteorder)
    with tifffile.TiffFile(path) as tiff:
        assert len(tiff.pages) == 1
    file = open_tiff(path)
    assert file.count == 4
    for k, plane in enumerate(stack):
        np.testing.assert_array_equal(file.read(k), plane)
    path.write_bytes(path.read_bytes()[: -W * H])  # not a stack any more
    file = open_tiff(path)
    assert file.count == 1
    np.testing.assert_array_equal(file.read(0), stack[0])


@pytest.mark.slow
def test_long_stack(tmp_path: Path) -> None:
    path, last = tmp_path / "a.tif", 15_999
    with tifffile.TiffWriter(path) as tiff:
        for k in range(last + 1):
            tiff.write(GREY if k < last else 255 - GREY, metadata=None, contiguous=False)
    file = open_tiff(path)
    assert file.count == last + 1 and file.needed == W * H
    np.testing.assert_array_equal(file.read(last), 255 - GREY)
    np.testing.assert_array_equal(file.read(last - 1), GREY)


# ---- Damage


def stack_of_two(path: Path) -> tuple[Path, list[int]]:
    """A file, and the offsets of its directories."""
    with tifffile.TiffWriter(path) as tiff:
        for _ in range(2):
            tiff.write(GREY, metadata=None, contiguous=False)
    with tifffile.TiffFile(path) as tiff:
        return path, [page.offset for page in tiff.pages]


@pytest.mark.parametrize("link", ["itself", "first", "beyond the end"])
def test_chain_of_directories_that_does_not_end(tmp_path: Path, link: str) -> None:
    path, (first, second) = stack_of_two(tmp_path / "a.tif")
    data = bytearray(path.read_bytes())
    target = {"itself": second, "first": first, "beyond the end": len(data) + 8}[link]
    (count,) = struct.unpack_from("<H", data, second)
    struct.pack_into("<I", data, second + 2 + 12 * count, target)
    path.write_bytes(data)
    assert "TIFF data is damaged" in refused(path)


@pytest.mark.parametrize("kept", [0, 4, 8, 9, 60, 300, 0.6, 0.98])
def test_file_that_is_cut_off(tmp_path: Path, kept: float) -> None:
    path, _ = stack_of_two(tmp_path / "a.tif")
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data) if 0 < kept < 1 else kept)])
    with pytest.raises(ImageError, match="TIFF data is damaged"):
        open_tiff(path).read(1)


def test_directory_of_more_entries_than_any_has(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(struct.pack("<2sHIH", b"II", 42, 8, 5000) + bytes(60_004))
    assert "TIFF data is damaged" in refused(tmp_path / "a.tif")


@pytest.mark.parametrize("packed", PILLOW_PACKED)
@pytest.mark.parametrize("rows", [H, H - 1])
def test_strips_that_are_cut(tmp_path: Path, packed: str, rows: int) -> None:
    """What is missing is never filled in, not even the last pixel."""
    path = tmp_path / "a.tif"
    noise = np.random.default_rng(0).integers(0, 256, (rows, W), dtype=np.uint8)
    pillow.fromarray(noise).save(path, compression=packed, tiffinfo={278: rows})
    with tifffile.TiffFile(path) as tiff:
        (length,) = tiff.pages[0].databytecounts
    np.testing.assert_array_equal(read(path), noise)
    for missing in (8, 100, length // 2, length - 1):
        overwrite(path, 279, length - missing)
        assert "TIFF data is damaged" in refused(path)


@pytest.mark.parametrize(
    "tag, value",
    [
        *(
            (273, 2**31),
            (278, 1),
            (278, 0),
            (256, 0),
            (277, 0),
            (258, 0),
            (257, H + 1),
        ),
        *((322, 0), (322, 16), (323, 16)),
    ],
)
def test_damaged_values(tmp_path: Path, tag: int, value: int) -> None:
    if tag in (322, 323):
        tifffile.imwrite(tmp_path / "a.tif", GREY, tile=(32, 48))
        path = overwrite(tmp_path / "a.tif", tag, value)
    else:
        path = hand_made(tmp_path / "a.tif", GREY.tobytes(), **{f"t{tag}": value})
    phrase = "damaged|too small|a pixel has 0 values|the values in the TIFF have 0 bits"
    assert re.search(phrase, refused(path))


def test_tag_whose_values_lie_outside_the_file(tmp_path: Path) -> None:
    """tifffile leaves such a tag out, and would read grey values instead of a palette."""
    tifffile.imwrite(
        tmp_path / "a.tif", GREY, photometric="palette", colormap=np.zeros((3, 256), np.uint16)
    )
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        entry = tiff.pages[0].tags[320].offset
    data = bytearray((tmp_path / "a.tif").read_bytes())
    struct.pack_into("<I", data, entry + 8, len(data))
    (tmp_path / "a.tif").write_bytes(data)
    assert "TIFF data is damaged" in refused(tmp_path / "a.tif")


def test_small_files_that_claim_gigabytes(tmp_path: Path) -> None:
    path = hand_made(tmp_path / "a.tif", GREY.tobytes(), t256=2**16, t257=2**16)
    assert "is larger than" in refused(path)
    file: ImageFile = open_tiff(hand_made(path, GREY.tobytes(), t256=8000, t257=8000, t278=8000))
    assert file.needed == 8000 * 8000
    with pytest.raises(ImageError, match="TIFF data is damaged"):
        file.read(0)
    tifffile.imwrite(path, GREY, tile=(32, 48))
    overwrite(overwrite(path, 322, 2**16), 323, 2**16)
    assert "GiB" in refused(path)


def test_a_damaged_directory_costs_its_page_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, STACK, photometric="minisblack")
    with tifffile.TiffFile(path) as file:
        tag = file.pages[2].tags["ImageWidth"]
    data = bytearray(path.read_bytes())
    data[tag.offset + 2] = 99  # the type of its value
    path.write_bytes(data)
    items = frames(path)
    assert [isinstance(item, GreyFrame) for item in items] == [True, True, False, True, True]
    assert "TIFF data is damaged" in items[2].reason
