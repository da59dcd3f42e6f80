"""JPEG data: whole data gives libjpeg's pixels, other is refused, and colours are as marked."""

import io
import re
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from model.images import jpeg
from model.images.jpeg import JpegFrame, decode_jpeg, find_jpeg_frame, read_jpeg_header
from model.images.limits import ImageError
from test.support.image_files import RGB, H, W

Image = pytest.importorskip("PIL.Image")

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
WRITERS = {
    "grey": {"mode": "L"},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "RGB": {"keep_rgb": True},
    "restarts": {"restart_marker_blocks": 2},
    "tables for this image": {"optimize": True, "quality": 98},
    "progressive": {"progressive": True},
    "grey, progressive": {"mode": "L", "progressive": True},
    "progressive, restarts": {"progressive": True, "restart_marker_blocks": 3},
}


def by_pillow(mode: str = "RGB", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RGB).convert(mode).save(stream, "JPEG", **options)
    return stream.getvalue()


def by_opencv(data: bytes) -> np.ndarray:
    """What libjpeg makes of it without strictness."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    return image if image.ndim == 2 else image[..., ::-1]


def split(data: bytes) -> list[tuple[int, bytes]]:
    """(marker, bytes from the marker to the next) of a JPEG that Pillow wrote, without SOI."""
    parts, at = [], 2
    while data[at + 1] != 0xD9:
        end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
        if data[at + 1] == 0xDA:
            end = re.compile(rb"\xff[^\x00\xd0-\xd7]").search(data, end).start()
        parts.append((data[at + 1], data[at:end]))
        at = end
    return parts


def join(*parts: bytes) -> bytes:
    return b"".join((SOI, *parts, EOI))


def unmarked(data: bytes) -> bytes:
    """Without JFIF and Adobe."""
    return join(*(part for marker, part in split(data) if marker not in (0xE0, 0xEE)))


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


JFIF = segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")


def adobe(transform: int) -> bytes:
    return segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))


def refused(data: bytes, phrase: str) -> None:
    with pytest.raises(ImageError, match=phrase):
        decode_jpeg(data)


# ---- Whole data


@pytest.mark.parametrize("name", WRITERS)
def test_pixels_are_those_of_libjpeg(name: str) -> None:
    data = by_pillow(**WRITERS[name])
    pixels = decode_jpeg(data)
    assert pixels.dtype == np.uint8 and pixels.shape[:2] == (H, W)
    np.testing.assert_array_equal(pixels, by_opencv(data))


@pytest.mark.parametrize("sampling", [0x411111, 0x221111, 0x211111, 0x121111, 0x111111])
@pytest.mark.parametrize("size", [(40, 60), (41, 61), (33, 35)])
def test_subsampling(sampling: int, size: tuple[int, int]) -> None:
    image = np.resize(RGB, (*size, 3))
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling])[1].tobytes()
    np.testing.assert_array_equal(decode_jpeg(data), by_opencv(data))


@pytest.mark.parametrize("behind", [b"\0" * 9, b"\xff\xda\0", by_pillow("L"), b"\xff\xd8\xff\xd9"])
def test_only_the_first_image_counts(behind: bytes) -> None:
    data = by_pillow()
    np.testing.assert_array_equal(decode_jpeg(data + behind), by_opencv(data))


def test_marks_within_remarks_do_not_count() -> None:
    data = by_pillow()
    thumbnail = segment(0xE1, b"Exif\0\0" + by_pillow("L"))
    np.testing.assert_array_equal(decode_jpeg(SOI + thumbnail + data[2:]), by_opencv(data))


def test_remark_of_wrong_length_and_fill_bytes() -> None:
    data = by_pillow()
    remark = segment(0xE5, b"remark")
    np.testing.assert_array_equal(decode_jpeg(SOI + remark + b"more" + data[2:]), by_opencv(data))
    np.testing.assert_array_equal(decode_jpeg(SOI + b"\xff\xff" + data[2:]), by_opencv(data))


def test_missing_end_mark_behind_whole_pixels() -> None:
    data = by_pillow()
    for cut in (data[:-2], data[:-1]):
        np.testing.assert_array_equal(decode_jpeg(cut), by_opencv(data))


def test_many_threads() -> None:
    data = {name: by_pillow(**options) for name, options in WRITERS.items()}
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(decode_jpeg, [*data.values()] * 20))
    for pixels, expected in zip(found, [*data.values()] * 20, strict=True):
        np.testing.assert_array_equal(pixels, by_opencv(expected))


# ---- Lost data


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("tail", [b"", EOI])
def test_every_cut_is_noticed(name: str, tail: bytes) -> None:
    data = by_pillow(**WRITERS[name])
    for length in range(len(data) - 2):
        refused(data[:length] + tail, "truncated")


@pytest.mark.parametrize("name", ["progressive", "grey, progressive"])
def test_each_scan_is_needed(name: str) -> None:
    parts = split(by_pillow(**WRITERS[name]))
    scans = [k for k, (marker, _) in enumerate(parts) if marker == 0xDA]
    assert len(scans) > 5
    for lost in scans:
        kept = [part for k, (_, part) in enumerate(parts) if k != lost]
        refused(join(*kept), "truncated: some of its scans are missing|is damaged")
    last = [part for k, (_, part) in enumerate(parts) if k != scans[-1]]
    assert by_opencv(join(*last)) is not None  # it gives no warning
    refused(join(*last), "truncated: some of its scans are missing")


def test_component_without_a_scan() -> None:
    """Sequential, each component in a scan of its own; the last one is lost."""
    parts = split(by_pillow(subsampling=0))
    grey = split(by_pillow("L"))
    tables = [part for marker, part in parts if marker in (0xDB, 0xC0, 0xC4)]
    (scan,) = [part for marker, part in grey if marker == 0xDA]
    assert scan[4:7] == b"\1\1\0"
    each = [scan[:5] + bytes([k]) + scan[6:] for k in (1, 2, 3)]
    tables += [part for marker, part in grey if marker == 0xC4]
    assert decode_jpeg(join(*tables, *each)).shape == (H, W, 3)
    refused(join(*tables, *each[:2]), "truncated: some of its scans are missing")


def test_damage_that_libjpeg_only_warns_of() -> None:
    data = by_pillow("L", quality=95)
    hole = len(data) // 2
    refused(data[:hole] + bytes(200) + data[hole + 200 :], "damaged")
    restarts = by_pillow(restart_marker_blocks=2)
    at = restarts.index(b"\xff\xd1")
    refused(restarts[:at] + restarts[at + 2 :], "damaged")
    table = data.index(b"\xff\xc4")
    refused(data[:table] + b"lost" + data[table:], "damaged")


# ---- Kinds that cannot be read


@pytest.mark.parametrize(
    ("marker", "phrase"),
    [
        (0xC3, r"a JPEG without loss \(lossless\), which cannot be read: save it as an ordinary"),
        (0xC9, "a JPEG with arithmetic coding"),
        (0xCA, "a JPEG with arithmetic coding"),
        (0xC5, r"a JPEG in layers \(hierarchical\)"),
        (0xF7, "a JPEG of the kind JPEG-LS"),
    ],
)
def test_other_kinds_of_jpeg(marker: int, phrase: str) -> None:
    data = by_pillow().replace(b"\xff\xc0", bytes([0xFF, marker]))
    refused(data, phrase)
    with pytest.raises(ImageError, match=phrase):
        read_jpeg_header(data)
    frame = find_jpeg_frame(data)
    assert frame is not None and frame.marker == marker


def changed_frame(data: bytes, change: Callable[[bytearray], None]) -> bytes:
    """Change the frame header, which starts at its marker."""
    at = data.index(b"\xff\xc0")
    frame = bytearray(data[at:])
    change(frame)
    return data[:at] + bytes(frame)


def test_bits_colours_and_heights() -> None:
    data = by_pillow()
    refused(changed_frame(data, lambda frame: frame.__setitem__(4, 12)), "of 12 bits per value")
    refused(by_pillow("CMYK"), "a JPEG in CMYK, the colours of print: save it in grey or RGB")
    refused(
        changed_frame(data, lambda frame: frame.__setitem__(slice(5, 7), b"\0\0")),
        r"tells its height behind its pixels \(DNL\)",
    )
    told = data[:-2] + segment(0xDC, struct.pack(">H", H + 8)) + EOI
    refused(told, r"tells its height behind its pixels \(DNL\)")
    told = data[:-2] + segment(0xDC, struct.pack(">H", H)) + EOI
    np.testing.assert_array_equal(decode_jpeg(told), by_opencv(data))
    refused(
        changed_frame(data, lambda frame: frame.__setitem__(11, 0x31)),
        "with an unusual subsampling of its colours",
    )


def test_what_is_no_jpeg() -> None:
    for data in (b"", b"\xff\xd8", b"\x89PNG", SOI + EOI, by_pillow()[2:]):
        refused(data, "JPEG data is")
        assert find_jpeg_frame(data) is None


@pytest.mark.parametrize("part", [segment(0xFE, b""), segment(0xDB, b"\0" + bytes(range(1, 65)))])
def test_endless_segments(part: bytes) -> None:
    refused(SOI + part * 20_000 + by_pillow()[2:], "damaged")


def test_too_many_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    data = by_pillow("L", progressive=True)
    scans = sum(marker == 0xDA for marker, _ in split(data))
    monkeypatch.setattr(jpeg, "_MAX_SCANS", scans)
    assert decode_jpeg(data).shape == (H, W)
    monkeypatch.setattr(jpeg, "_MAX_SCANS", scans - 1)
    refused(data, "damaged")


# ---- Headers


def test_frame_and_exif() -> None:
    data = by_pillow(subsampling=1)
    exif = segment(0xE1, b"Exif\0\0MM\0*")
    frame = JpegFrame(0xC0, 8, (W, H), ((1, 0x21), (2, 0x11), (3, 0x11)))
    assert find_jpeg_frame(data) == frame
    assert read_jpeg_header(data) == (frame, b"")
    assert read_jpeg_header(SOI + segment(0xE1, b"http:xmp") + exif + data[2:]) == (
        frame,
        b"MM\0*",
    )


# ---- Colours


def test_container_decides_where_the_data_does_not() -> None:
    ycc = unmarked(by_pillow(subsampling=0))
    values = decode_jpeg(ycc, "RGB")
    ycrcb = cv2.cvtColor(RGB, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
    assert np.abs(values.astype(int) - ycrcb).max() < 9  # the stored values
    for colours in ("as marked", "YCbCr"):
        np.testing.assert_array_equal(decode_jpeg(ycc, colours), by_opencv(ycc))
    assert np.abs(decode_jpeg(ycc).astype(int) - RGB).max() < 12


@pytest.mark.parametrize("colours", ["as marked", "YCbCr", "RGB"])
def test_marks_count_more_than_the_container(colours: str) -> None:
    ycc = unmarked(by_pillow(subsampling=0))
    as_ycc, as_rgb = decode_jpeg(ycc, "YCbCr"), decode_jpeg(ycc, "RGB")
    for mark, expected in (
        (JFIF, as_ycc),
        (adobe(1), as_ycc),
        (adobe(0), as_rgb),
        (adobe(2), as_ycc),
        (JFIF + adobe(0), as_ycc),
    ):
        data = SOI + mark + ycc[2:]
        np.testing.assert_array_equal(decode_jpeg(data, colours), expected)
        np.testing.assert_array_equal(by_opencv(data), expected)


@pytest.mark.parametrize("colours", ["as marked", "YCbCr", "RGB"])
def test_identifiers_and_subsampling_are_marks(colours: str) -> None:
    rgb = unmarked(by_pillow(keep_rgb=True))
    assert rgb[rgb.index(b"\xff\xc0") + 10 :][:7:3] == b"RGB"
    np.testing.assert_array_equal(decode_jpeg(rgb, colours), by_opencv(rgb))
    assert np.abs(decode_jpeg(rgb, colours).astype(int) - RGB).max() < 12
    subsampled = unmarked(by_pillow(subsampling=2))
    np.testing.assert_array_equal(decode_jpeg(subsampled, colours), by_opencv(subsampled))


def test_grey_has_no_colours() -> None:
    data = by_pillow("L")
    for colours in ("as marked", "YCbCr", "RGB"):
        np.testing.assert_array_equal(decode_jpeg(data, colours), by_opencv(data))
