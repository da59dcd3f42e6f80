"""PNG, JPEG and BMP: orientation, transparency, and kinds that have to be refused by name."""

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from model.images.limits import UPRIGHT, ImageError, ImageFile
from model.images.pictures import open_picture
from test.support.image_files import GREY, RGB, H, W, write

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("error")
ALPHA = np.linspace(0, 255, H * W).round().astype(np.uint8).reshape(H, W)


def read(path: Path) -> np.ndarray:
    file = opened(path)
    pixels = file.read(0)
    assert file.size == (pixels.shape[1], pixels.shape[0])
    return pixels


def opened(path: Path) -> ImageFile:
    return open_picture(path, {".png": "PNG", ".jpg": "JPEG", ".bmp": "BMP"}[path.suffix])


def refused(path: Path, phrase: str) -> None:
    with pytest.raises(ImageError, match=phrase):
        opened(path).read(0)


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(path: Path, colours: int, bits: int, rows: list[bytes], *more: bytes) -> Path:
    """A PNG by hand.

    Args:
        colours: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGB and alpha.
        more: chunks before the pixels.
    """
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, bits, colours, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + pixels + chunk(b"IEND"))
    return path


def with_chunk(path: Path, *chunks: bytes) -> Path:
    """Put chunks behind the header of a PNG."""
    data = path.read_bytes()
    path.write_bytes(data[:33] + b"".join(chunks) + data[33:])
    return path


# ---- Orientation


def exif(orientation: int, order: str = ">", kind: int = 3, before: bytes = b"") -> bytes:
    mark = b"MM\0*" if order == ">" else b"II*\0"
    count = len(before) // 12 + 1
    entry = struct.pack(order + "HHIHH", 274, kind, 1, orientation, 0)
    return mark + struct.pack(order + "IH", 8, count) + before + entry + bytes(4)


UPRIGHTS = {
    1: GREY,
    2: GREY[:, ::-1],
    3: GREY[::-1, ::-1],
    4: GREY[::-1],
    5: GREY.T,
    6: GREY.T[:, ::-1],
    7: GREY.T[::-1, ::-1],
    8: GREY.T[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHTS)
def test_upright_as_pillow_shows_it(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    tags = Image.Exif()
    tags[274] = orientation
    picture = Image.fromarray(GREY)
    picture.save(tmp_path / "a.png", exif=tags)
    picture.save(tmp_path / "a.jpg", exif=tags, quality=95)
    for path in (tmp_path / "a.png", tmp_path / "a.jpg"):
        with Image.open(path) as shown:
            expected = np.asarray(ImageOps.exif_transpose(shown))
        np.testing.assert_array_equal(read(path), expected)
        assert opened(path).warnings == ((UPRIGHT,) if orientation > 1 else ())
    np.testing.assert_array_equal(read(tmp_path / "a.png"), UPRIGHTS[orientation])


def test_upright_colours(tmp_path: Path) -> None:
    path = with_chunk(write(tmp_path / "a.png", RGB[..., ::-1]), chunk(b"eXIf", exif(6)))
    np.testing.assert_array_equal(read(path), np.rot90(RGB, -1))


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt"])
def test_orientation_in_text_as_imagemagick_writes_it(tmp_path: Path, kind: bytes) -> None:
    data = b"Exif\0\0" + exif(8, "<")
    text = b"\nexif\n%8d\n%b\n" % (len(data), data.hex().encode())
    text = b"\0" + zlib.compress(text) if kind == b"zTXt" else text
    path = write(tmp_path / "a.png", GREY)
    with_chunk(path, chunk(kind, b"Raw profile type exif\0" + text))
    np.testing.assert_array_equal(read(path), UPRIGHTS[8])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"MM\0*",
        b"Exif\0\0",
        exif(6)[:18],
        exif(0),
        exif(9),
        exif(6, kind=4),
        b"XX" + exif(6)[2:],
        exif(6)[:4] + b"\xff\xff\xff\xff" + exif(6)[8:],
    ],
)
def test_damaged_exif_is_ignored(tmp_path: Path, data: bytes) -> None:
    path = with_chunk(write(tmp_path / "a.png", GREY), chunk(b"eXIf", data))
    np.testing.assert_array_equal(read(path), GREY)
    assert opened(path).warnings == ()
    path = write(tmp_path / "a.jpg", GREY)
    expected, content = read(path), path.read_bytes()
    block = struct.pack(">HH", 0xFFE1, len(data) + 8) + b"Exif\0\0" + data
    path.write_bytes(content[:2] + block + content[2:])
    np.testing.assert_array_equal(read(path), expected)


def test_text_and_checksums_that_are_damaged(tmp_path: Path) -> None:
    name = b"Raw profile type exif\0"
    for bad in (
        chunk(b"zTXt", name + b"\0no deflate"),
        chunk(b"tEXt", name + b"\nexif\n 4\nxyz"),
        chunk(b"tEXt", name),
        chunk(b"eXIf", exif(6))[:-1] + b"?",
    ):
        path = with_chunk(write(tmp_path / "a.png", GREY), bad)
        np.testing.assert_array_equal(read(path), GREY)


# ---- Transparency of PNG


def composed(image: np.ndarray, alpha: np.ndarray, top: int = 255) -> np.ndarray:
    return np.rint(image.astype(float) * (alpha if image.ndim == 2 else alpha[..., None]) / top)


def test_alpha_is_composed_over_black(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.dstack([RGB, ALPHA])).save(path)
    pixels = read(path)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels, composed(RGB, ALPHA), atol=1)
    np.testing.assert_array_equal(pixels[ALPHA == 255], RGB[ALPHA == 255])
    Image.fromarray(np.dstack([GREY, ALPHA])).save(path)
    np.testing.assert_allclose(read(path)[..., 0], composed(GREY, ALPHA), atol=1)


def test_wide_alpha(tmp_path: Path) -> None:
    image, alpha = RGB.astype(np.uint16) * 257 - 3, ALPHA.astype(np.uint16) * 257
    path = write(tmp_path / "a.png", np.dstack([image[..., ::-1], alpha]))
    np.testing.assert_allclose(read(path), composed(image, alpha, 65535), atol=1)
    opaque = np.full((H, W), 65535, np.uint16)
    opaque[0, 0] = 0
    pixels = read(write(path, np.dstack([image[..., ::-1], opaque])))
    assert not pixels[0, 0].any()
    np.testing.assert_array_equal(pixels[1:], image[1:])


def test_opaque_alpha_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", np.dstack([RGB[..., ::-1], np.full((H, W), 255, np.uint8)]))
    np.testing.assert_array_equal(read(path), RGB)


def test_transparent_values_in_grey_rgb_and_palette(tmp_path: Path) -> None:
    rows, path = [row.tobytes() for row in GREY], tmp_path / "a.png"
    key = int(GREY[3, 5])
    expected = np.where(key == GREY, 0, GREY)
    png(path, 0, 8, rows, chunk(b"tRNS", struct.pack(">H", key)))
    np.testing.assert_array_equal(read(path), expected)
    wide = GREY.astype(">u2") * 257
    mark = chunk(b"tRNS", struct.pack(">H", 257 * key))
    png(path, 0, 16, [row.tobytes() for row in wide], mark)
    np.testing.assert_array_equal(read(path), expected * np.uint16(257))
    mark = chunk(b"tRNS", struct.pack(">3H", *RGB[3, 5]))
    png(path, 2, 8, [row.tobytes() for row in RGB], mark)
    is_key = (RGB[3, 5] == RGB).all(-1)
    np.testing.assert_array_equal(read(path), np.where(is_key[..., None], 0, RGB))
    palette = chunk(b"PLTE", bytes(np.repeat(np.arange(255, -1, -1), 3).astype(np.uint8)))
    png(path, 3, 8, rows, palette, chunk(b"tRNS", bytes(key) + b"\xff\0"))
    inverse = 255 - GREY
    inverse[key > GREY] = 0
    inverse[key + 1 == GREY] = 0
    np.testing.assert_array_equal(read(path)[..., 0], inverse)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_transparent_grey_of_few_bits(tmp_path: Path, bits: int) -> None:
    levels = GREY >> (8 - bits)
    spread = np.unpackbits(levels.reshape(-1, 1), axis=1)[:, -bits:].reshape(H, -1)
    rows = [row.tobytes() for row in np.packbits(spread, axis=1)]
    expected = levels * np.uint8(255 // (2**bits - 1))
    np.testing.assert_array_equal(read(png(tmp_path / "a.png", 0, bits, rows)), expected)
    png(tmp_path / "a.png", 0, bits, rows, chunk(b"tRNS", b"\0\1"))
    np.testing.assert_array_equal(read(tmp_path / "a.png"), np.where(levels == 1, 0, expected))


def test_fully_transparent(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", np.dstack([RGB, np.zeros((H, W), np.uint8)]))
    refused(path, "the image is fully transparent: save it without transparency")


# ---- Other kinds of PNG


def test_cgbi(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", GREY)
    data = path.read_bytes()
    path.write_bytes(data[:8] + chunk(b"CgBI", b"P\0 \2") + data[8:])
    refused(path, r"a PNG of Apple's own kind \(CgBI\), which cannot be read: save it again as an")


def test_animation_gives_its_still_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    first, *others = (Image.fromarray(image) for image in (GREY, 255 - GREY, GREY // 2))
    for default_image in (False, True):
        first.save(path, save_all=True, append_images=others, default_image=default_image)
        np.testing.assert_array_equal(read(path), GREY)
        assert "only its still image is read" in opened(path).warnings[0]


def test_png_with_bytes_behind_or_odd_remarks(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", GREY)
    path.write_bytes(path.read_bytes() + b"\x89PNG more")
    np.testing.assert_array_equal(read(path), GREY)
    with_chunk(path, chunk(b"tEXt", b"a\0b")[:-1] + b"?", chunk(b"gAMA", b"\0\0\xb1\x8f"))
    np.testing.assert_array_equal(read(path), GREY)


def test_damaged_png(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", GREY)
    data = bytearray(path.read_bytes())
    for at in (len(data) - 14, len(data) // 2, 20, 30):  # checksums, pixels, size
        changed = data.copy()
        changed[at] ^= 1
        path.write_bytes(changed)
        refused(path, "PNG data is damaged")
    rows = [row.tobytes() for row in GREY]
    refused(png(path, 0, 8, rows[:-3]), "PNG data is damaged")
    refused(png(path, 0, 8, rows, chunk(b"ABCD", b"what is this?")), "PNG data is damaged")
    path.write_bytes(data[:-12])
    refused(path, "PNG data is truncated: its end mark is missing")
    path.write_bytes(data[:20])
    refused(path, "PNG data is truncated")


# ---- BMP

PALETTE = bytes(np.column_stack([np.arange(256)] * 3 + [np.zeros(256)]).astype(np.uint8).ravel())
BGR = [row.tobytes() for row in RGB[..., ::-1]]
BGRA = [row.tobytes() for row in np.dstack([RGB[..., ::-1], ALPHA])]
BGR0 = [row.tobytes() for row in np.dstack([RGB[..., ::-1], 0 * ALPHA])]
RGB0 = [row.tobytes() for row in np.dstack([RGB, 0 * ALPHA])]
STANDARD, REVERSED = (0xFF0000, 0xFF00, 0xFF), (0xFF, 0xFF00, 0xFF0000)


def bmp(
    path: Path,
    bits: int,
    rows: list[bytes],
    head_bytes: int = 40,
    masks: tuple[int, ...] = (),
    palette: bytes = b"",
    compression: int | None = None,
    downwards: bool = False,
) -> Path:
    """A BMP by hand; its rows run upwards by default."""
    rows = [row + bytes(-len(row) % 4) for row in rows]
    body = b"".join(rows if downwards else rows[::-1])
    kind = (3 if masks else 0) if compression is None else compression
    if head_bytes == 12:
        head = struct.pack("<I4H", 12, W, H, 1, bits)
    else:
        height = -H if downwards else H
        head = struct.pack("<IiiHHII16x", head_bytes, W, height, 1, bits, kind, len(body))
        head = head[:head_bytes]
    head += struct.pack(f"<{len(masks)}I", *masks)
    head = head.ljust(head_bytes, b"\0") + palette
    start = struct.pack("<2sI4xI", b"BM", 14 + len(head) + len(body), 14 + len(head))
    path.write_bytes(start + head + body)
    return path


def test_bmp_of_every_common_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    grey = [row.tobytes() for row in GREY]
    inverse = bytes(np.frombuffer(PALETTE, np.uint8).reshape(-1, 4)[::-1].ravel())
    np.testing.assert_array_equal(read(bmp(path, 8, grey, palette=PALETTE)), GREY)
    np.testing.assert_array_equal(read(bmp(path, 8, grey, palette=inverse)), 255 - GREY)
    np.testing.assert_array_equal(read(bmp(path, 8, grey, 64, palette=PALETTE)), GREY)
    for head_bytes in (40, 64, 108, 124):
        for downwards in (False, True):
            made = bmp(path, 24, BGR, head_bytes, downwards=downwards)
            np.testing.assert_array_equal(read(made), RGB)
    Image.fromarray(GREY > 127).save(path)
    np.testing.assert_array_equal(read(path), np.where(GREY > 127, 255, 0))
    levels = GREY >> 4
    nibbles = [row.tobytes() for row in levels[:, ::2] << 4 | levels[:, 1::2]]
    sixteen = bytes(np.column_stack([np.arange(16) * 17] * 4).astype(np.uint8).ravel())
    np.testing.assert_array_equal(read(bmp(path, 4, nibbles, palette=sixteen)), levels * 17)


def test_fourth_byte_of_bmp(tmp_path: Path) -> None:
    """It is alpha if the header says so and it is not 0 everywhere."""
    path = tmp_path / "a.bmp"
    for rows in (BGRA, BGR0):
        np.testing.assert_array_equal(read(bmp(path, 32, rows)), RGB)
        np.testing.assert_array_equal(read(bmp(path, 32, rows, masks=STANDARD)), RGB)
        made = bmp(path, 32, rows, 108, (*STANDARD, 0))
        np.testing.assert_array_equal(read(made), RGB)
    made = bmp(path, 32, BGR0, 108, (*STANDARD, 0xFF000000))
    np.testing.assert_array_equal(read(made), RGB)
    made = bmp(path, 32, BGRA, 108, (*STANDARD, 0xFF000000))
    np.testing.assert_allclose(read(made), composed(RGB, ALPHA), atol=1)
    made = bmp(path, 32, RGB0, 108, (*REVERSED, 0xFF000000))
    np.testing.assert_array_equal(read(made), RGB)


def test_bmp_of_16_bits(tmp_path: Path) -> None:
    path, (red, green, blue) = tmp_path / "a.bmp", np.moveaxis(RGB.astype("<u2"), -1, 0)
    five = [row.tobytes() for row in (red >> 3) << 10 | (green >> 3) << 5 | blue >> 3]
    for masks in ((), (0x7C00, 0x3E0, 0x1F)):
        assert np.abs(read(bmp(path, 16, five, masks=masks)).astype(int) - RGB).max() < 8
    six = [row.tobytes() for row in (red >> 3) << 11 | (green >> 2) << 5 | blue >> 3]
    masks = (0xF800, 0x7E0, 0x1F)
    assert np.abs(read(bmp(path, 16, six, masks=masks)).astype(int) - RGB).max() < 8
    refused(bmp(path, 16, six, masks=(0xF00, 0xF0, 0xF)), "unusual layout of its colours")
    refused(bmp(path, 16, six, 108, masks=masks), "unusual layout of its colours")


def test_bmp_that_opencv_would_mix_up(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    phrase = r"a BMP with an unusual layout of its colours \(bit masks\), .*: save it as .png"
    refused(bmp(path, 32, RGB0, masks=REVERSED), phrase)
    refused(bmp(path, 32, RGB0, masks=(0x3FF00000, 0xFFC00, 0x3FF)), phrase)
    refused(bmp(path, 32, RGB0, masks=(0xFF000000, 0xFF0000, 0xFF00)), phrase)
    for head_bytes in (12, 16):
        phrase = f"a BMP of OS/2, with a header of {head_bytes} bytes, which cannot be read: save"
        refused(bmp(path, 24, BGR, head_bytes), phrase)
    refused(bmp(path, 1, BGR, 64, compression=3), "a BMP of OS/2, with a header of 64 bytes")
    refused(bmp(path, 0, BGR, compression=4), "BMP data is damaged, truncated or of a variant")


def test_bmp_cut_off_or_with_a_wrong_start(tmp_path: Path) -> None:
    path = bmp(tmp_path / "a.bmp", 24, BGR)
    data = path.read_bytes()
    path.write_bytes(data + b"more")
    np.testing.assert_array_equal(read(path), RGB)
    for length in (len(data) - 1, len(data) // 2, 60, 20, 3):
        path.write_bytes(data[:length])
        refused(path, "BMP data is damaged")
    path.write_bytes(data[:10] + bytes(4) + data[14:])
    refused(path, "BMP data is damaged")


# ---- All of them


def test_many_threads(tmp_path: Path) -> None:
    rgba = np.dstack([RGB[..., ::-1], ALPHA])
    paths = [write(tmp_path / f"a{suffix}", rgba[..., :3]) for suffix in (".png", ".jpg", ".bmp")]
    paths.append(write(tmp_path / "b.png", rgba))
    expected = [read(path) for path in paths]
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(read, paths * 20))
    for pixels, right in zip(found, expected * 20, strict=True):
        np.testing.assert_array_equal(pixels, right)


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = bmp(tmp_path / "a.bmp", 24, BGR)
    path.write_bytes(path.read_bytes()[:-9])
    refused(path, "BMP data is damaged")
    path = write(tmp_path / "a.jpg", RGB)
    path.write_bytes(path.read_bytes()[:-99] + b"\xff\xd9")
    refused(path, "JPEG data is damaged")
    path = with_chunk(write(tmp_path / "a.png", GREY), chunk(b"iCCP", b"a\0\0" + bytes(9)))
    np.testing.assert_array_equal(read(path), GREY)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp"])
def test_memory_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    path = write(tmp_path / f"a{suffix}", RGB)
    monkeypatch.setattr("model.images.pictures.decode_jpeg", fail)
    monkeypatch.setattr(cv2, "imdecode", fail)
    refused(path, "not enough memory for the image")


def test_picture_of_another_size_than_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.png", GREY)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: GREY[1:])
    refused(path, "PNG data is damaged")


def test_needed_bytes(tmp_path: Path) -> None:
    assert opened(write(tmp_path / "a.png", GREY)).needed == 8 * H * W
