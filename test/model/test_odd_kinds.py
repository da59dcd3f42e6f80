"""One picture in every odd way that files are written: the angle is that of the plain PNG.

pydicom, tifffile, Pillow and SimpleITK write the files, so that reader and writer are of two hands.
"""

import io
import struct
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image
from pydicom.encaps import encapsulate

from model.images.reader_pool import Readers
from model.images.source import ImageError, open_image
from model.measure import measure_frame
from model.results.schemas import CaseEntry
from test.phantom import phantom
from test.support.runs import shipped

pytestmark = pytest.mark.slow  # the shipped model answers each

MADE = phantom(18, 320, 256)
GREY = MADE.image
TINTED = np.dstack([GREY, GREY // 4 * 3, GREY // 2 + 20]).astype(np.uint8)
MARKED = np.dstack([GREY] * 3)
MARKED[230:240, 20:40] = (255, 200, 0)  # a yellow mark
WIDE = cv2.resize(GREY, (480, 256), interpolation=cv2.INTER_CUBIC)  # pixels 2 wide and 3 high
OUTSIDE = GREY == 0
NO_SPACING = "1.2.840.10008.5.1.4.1.1.3.1"


def measured(path: Path) -> CaseEntry:
    source = open_image(path)
    assert not source.is_stack
    (frame,) = source.frames()
    return measure_frame("case", path.name, frame, shipped())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The angle of the plain PNG, grey and tinted."""
    folder = tmp_path_factory.mktemp("plain")
    angles = {}
    for name, pixels in (("grey", GREY), ("tinted", TINTED)):
        Image.fromarray(pixels).save(folder / f"{name}.png")
        angles[name] = measured(folder / f"{name}.png").aop_deg
    return angles


# ---- DICOM


def dicom(path: Path, pixels: np.ndarray, syntax: str = "1.2.1", **elements: object) -> Path:
    """A file of one frame, written by pydicom.

    Args:
        elements: further elements, or other values for those that describe the pixels; raw
            pixels by PixelData.
    """
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = f"1.2.840.10008.{syntax}"
    bits = 8 * pixels.itemsize
    values = {
        "SOPClassUID": NO_SPACING,
        "SOPInstanceUID": "1.2.3",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": pixels.shape[2] if pixels.ndim == 3 else 1,
        "PhotometricInterpretation": "RGB" if pixels.ndim == 3 else "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": pixels.tobytes(),
    }
    if pixels.ndim == 3:
        values["PlanarConfiguration"] = 0
    for keyword, value in {**values, **elements}.items():
        setattr(dataset, keyword, value)
    dataset["PixelData"].VR = "OB" if bits == 8 and syntax != "1.2.2" else "OW"
    dataset.save_as(path, enforce_file_format=True)
    return path


def jpeg(pixels: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95, **options)
    return stream.getvalue()


def without_markers(data: bytes) -> bytes:
    """A JPEG without its JFIF and Adobe segments."""
    at = 2
    while data[at + 1] in (0xE0, 0xEE):
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data[:2] + data[at:]


def in_dicom(path: Path, data: bytes, like: np.ndarray, **elements: object) -> Path:
    packed = encapsulate([data])
    return dicom(path, like, "1.2.4.50", PixelData=packed, **elements)


def region(x: float, y: float, kind: int = 1, unit: int = 3) -> pydicom.Dataset:
    item = pydicom.Dataset()
    item.RegionSpatialFormat, item.RegionDataType = (1, 1) if kind == 1 else (0, kind)
    item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = unit
    item.PhysicalDeltaX, item.PhysicalDeltaY = x, y
    return item


def ybr(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).convert("YCbCr"))


def shared_colours(pixels: np.ndarray) -> bytes:
    luma, blue, red = np.moveaxis(ybr(pixels), 2, 0)
    pairs = [luma[:, ::2], luma[:, 1::2], blue[:, ::2], red[:, ::2]]
    return np.stack(pairs, axis=-1).tobytes()


def palette(count: int, first: int, bits: int, data: Callable[[np.ndarray], bytes]) -> dict:
    """The elements of a palette whose entry for a number is that number."""
    entries = data(np.arange(first, first + count))
    found: dict[str, object] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in ("Red", "Green", "Blue"):
        name = f"{colour}PaletteColorLookupTable"
        found[f"{name}Descriptor"] = [count % 2**16, first, bits]
        found[f"{name}Data"] = entries
    return found


def words(entries: np.ndarray) -> bytes:
    return entries.astype("<u2").tobytes()


def small(entries: np.ndarray) -> bytes:
    return entries.astype(np.uint8).tobytes()


FROM_20 = np.minimum(GREY, 235) + np.uint8(20)  # numbers of a palette that begins with 20
WORDS = GREY.astype(np.uint16)
SIGNED = np.where(OUTSIDE, -32768, GREY.astype(np.int16) * 4 + 1000).astype(np.int16)
OVERLAY = WORDS | np.uint16(0x1000) * (np.indices(GREY.shape).sum(0) % 7 == 0)

DICOM: dict[str, Callable[[Path], Path]] = {
    "PixelAspectRatio": lambda p: dicom(p, WIDE, PixelAspectRatio=[3, 2]),
    "NominalScannedPixelSpacing": lambda p: dicom(p, WIDE, NominalScannedPixelSpacing=[0.3, 0.2]),
    "ImagerPixelSpacing": lambda p: dicom(p, WIDE, ImagerPixelSpacing=[0.3, 0.2]),
    "PixelAspectRatio beside 1 x 1": lambda p: dicom(
        p, WIDE, PixelAspectRatio=[3, 2], PixelSpacing=[1, 1]
    ),
    "regions of one shape": lambda p: dicom(
        p, WIDE, SequenceOfUltrasoundRegions=[region(0.02, 0.03), region(0.04, 0.06)]
    ),
    "a region of graphics": lambda p: dicom(
        p, WIDE, SequenceOfUltrasoundRegions=[region(0.5, 0.1, kind=6), region(0.02, 0.03)]
    ),
    "YCbCr JPEG labelled RGB": lambda p: in_dicom(p, jpeg(TINTED), TINTED),
    "RGB JPEG labelled YBR": lambda p: in_dicom(
        p, jpeg(TINTED, keep_rgb=True), TINTED, PhotometricInterpretation="YBR_FULL"
    ),
    "RGB JPEG without markers": lambda p: in_dicom(
        p, without_markers(jpeg(TINTED, keep_rgb=True)), TINTED
    ),
    "subsampled JPEG without markers": lambda p: in_dicom(p, without_markers(jpeg(TINTED)), TINTED),
    "colour JPEG under one sample": lambda p: in_dicom(p, jpeg(TINTED), GREY),
    "grey JPEG under three samples": lambda p: in_dicom(
        p, jpeg(GREY), TINTED, PhotometricInterpretation="YBR_FULL_422"
    ),
    "progressive JPEG": lambda p: in_dicom(p, jpeg(GREY, progressive=True), GREY),
    "YBR_FULL": lambda p: dicom(p, ybr(TINTED), PhotometricInterpretation="YBR_FULL"),
    "YBR_FULL_422": lambda p: dicom(
        p, TINTED, PhotometricInterpretation="YBR_FULL_422", PixelData=shared_colours(TINTED)
    ),
    "YBR_FULL_422 that is not shared": lambda p: dicom(
        p, ybr(TINTED), PhotometricInterpretation="YBR_FULL_422"
    ),
    "RGB under one sample": lambda p: dicom(
        p, GREY, PhotometricInterpretation="RGB", PixelData=TINTED.tobytes()
    ),
    "palette from 20 on": lambda p: dicom(
        p, FROM_20, **palette(236, 20, 8, lambda e: small(e - 20))
    ),
    "palette that ends early": lambda p: dicom(
        p, np.where(GREY > 250, 255, GREY).astype(np.uint8), **palette(251, 0, 16, words)
    ),
    "small values in a wide palette": lambda p: dicom(p, GREY, **palette(256, 0, 16, words)),
    "wide values in a wide palette": lambda p: dicom(
        p, GREY, **palette(256, 0, 16, lambda e: words(e * 257))
    ),
    "wide palette said to be narrow": lambda p: dicom(
        p, GREY, **palette(256, 0, 8, lambda e: words(e * 256))
    ),
    "narrow palette said to be wide": lambda p: dicom(p, GREY, **palette(256, 0, 16, small)),
    "palette of 65,536 colours": lambda p: dicom(p, WORDS * 257, **palette(2**16, 0, 16, words)),
    "signed numbers of a palette": lambda p: dicom(
        p,
        (GREY.astype(np.int16) - 100).astype(np.int16),
        **{
            key: [256, -100, 16] if key.endswith("Descriptor") else value
            for key, value in palette(256, 0, 16, words).items()
        },
    ),
    "padding": lambda p: dicom(p, SIGNED, PixelPaddingValue=-32768),
    "range of padding": lambda p: dicom(
        p,
        np.where(OUTSIDE & (np.indices(GREY.shape)[0] % 2 == 0), -32760, SIGNED).astype(np.int16),
        PixelPaddingValue=-32768,
        PixelPaddingRangeLimit=-32760,
    ),
    "overlay in unused bits": lambda p: dicom(p, OVERLAY, BitsStored=12, HighBit=11),
    "values in the upper bits": lambda p: dicom(
        p, (WORDS << 4).astype(np.uint16), BitsStored=12, HighBit=15
    ),
    "MONOCHROME1 of 12 bits": lambda p: dicom(
        p, 4095 - WORDS * 16, BitsStored=12, HighBit=11, PhotometricInterpretation="MONOCHROME1"
    ),
    "32 bits": lambda p: dicom(p, GREY.astype(np.uint32) * 70_000),
    "planes apart": lambda p: dicom(
        p, TINTED, PlanarConfiguration=1, PixelData=np.moveaxis(TINTED, 2, 0).tobytes()
    ),
    "big endian": lambda p: dicom(p, (WORDS * 9).astype(">u2"), "1.2.2"),
    "deflated": lambda p: dicom(p, GREY, "1.2.1.99"),
    "big endian in words": lambda p: dicom(
        p, GREY, "1.2.2", PixelData=GREY.view("<u2").astype(">u2").tobytes()
    ),
    "inverted presentation": lambda p: dicom(p, 255 - GREY, PresentationLUTShape="INVERSE"),
    "7 bits": lambda p: dicom(p, GREY >> 1, BitsStored=7, HighBit=6),
    "no padding told": lambda p: dicom(p, padded(-2000, np.int16)),
}


# ---- Pictures, TIFF and volumes


def tiff(path: Path, pixels: np.ndarray, **options: object) -> Path:
    tifffile.imwrite(path, pixels, **options)
    return path


def turned(path: Path, orientation: int) -> Path:
    """The picture as a camera would store it that was held in another way."""
    stored = {3: GREY[::-1, ::-1], 6: np.rot90(GREY), 8: np.rot90(GREY, -1), 2: GREY[:, ::-1]}
    exif = Image.Exif()
    exif[274] = orientation
    picture = Image.fromarray(np.ascontiguousarray(stored[orientation]))
    quality = {"quality": 95} if path.suffix == ".jpg" else {}
    picture.save(path, exif=exif, **quality)
    return path


def transparent(path: Path) -> Path:
    """Outside the sector there are hidden colours."""
    hidden = np.where(OUTSIDE, 200, GREY).astype(np.uint8)
    opacity = np.where(OUTSIDE, 0, 255).astype(np.uint8)
    Image.fromarray(np.dstack([hidden, hidden, hidden, opacity])).save(path)
    return path


def behind(path: Path, more: bytes) -> Path:
    path.write_bytes(jpeg(GREY) + more)
    return path


def volume(path: Path, array: np.ndarray) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    return path


def padded(value: float, kind: type) -> np.ndarray:
    return np.where(OUTSIDE, value, GREY.astype(kind) * 3 + 100).astype(kind)


OTHERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "min-is-white, 16 bits": (
        "a.tif",
        lambda p: tiff(p, 65535 - WORDS * 257, photometric="miniswhite"),
    ),
    "min-is-white, 32 bits": (
        "a.tif",
        lambda p: tiff(p, 2**32 - 1 - GREY.astype(np.uint32) * 9000, photometric="miniswhite"),
    ),
    "planes apart, 16 bits": (
        "a.tif",
        lambda p: tiff(
            p,
            np.stack([WORDS * 200] * 3),
            photometric="rgb",
            planarconfig="separate",
        ),
    ),
    "planes apart, float": (
        "a.tif",
        lambda p: tiff(
            p,
            np.stack([GREY.astype(np.float32)] * 3),
            photometric="rgb",
            planarconfig="separate",
        ),
    ),
    "turned TIFF": (
        "a.tif",
        lambda p: tiff(p, np.rot90(GREY).copy(), extratags=[(274, "H", 1, 6, True)]),
    ),
    **{f"turned JPEG, {n}": ("a.jpg", lambda p, n=n: turned(p, n)) for n in (2, 3, 6, 8)},
    **{f"turned PNG, {n}": ("a.png", lambda p, n=n: turned(p, n)) for n in (3, 6)},
    "transparent PNG": ("a.png", transparent),
    "bytes behind a JPEG": ("a.jpg", lambda p: behind(p, b"\0\xff\xda\0\xff\xd8\xff\xd9..")),
    "a second JPEG behind the first": ("a.jpg", lambda p: behind(p, jpeg(GREY[::-1])[:-9])),
    "colours as three slices": (
        "a.mha",
        lambda p: volume(p, np.moveaxis(MARKED, 2, 0).copy()),
    ),
    "colours as three slices, NIfTI": (
        "a.nii.gz",
        lambda p: volume(p, np.moveaxis(MARKED, 2, 0).copy()),
    ),
    "-1024 outside, TIFF": ("a.tif", lambda p: tiff(p, padded(-1024, np.int16))),
    "-1024 outside": ("a.mha", lambda p: volume(p, padded(-1024, np.int16))),
    "-32768 outside": ("a.nii", lambda p: volume(p, padded(-32768, np.int16))),
    "-1024 outside, float": ("a.nrrd", lambda p: volume(p, padded(-1024, np.float32))),
}
KINDS = {**{name: ("a.dcm", make) for name, make in DICOM.items()}, **OTHERS}
IN_COLOUR = {
    *(
        name
        for name in DICOM
        if "JPEG" in name and "grey" not in name and "progressive" not in name
    ),
    *("YBR_FULL", "YBR_FULL_422", "YBR_FULL_422 that is not shared", "RGB under one sample"),
    "planes apart",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_angle_is_that_of_the_plain_picture(
    tmp_path: Path, plain: dict[str, float], kind: str
) -> None:
    file, make = KINDS[kind]
    entry = measured(make(tmp_path / file))
    expected = plain["tinted" if kind in IN_COLOUR else "grey"]
    assert entry.aop_deg == pytest.approx(expected, abs=0.5)
    assert bool(entry.warnings) == any(
        word in kind for word in ("turned", "slices", "one shape")
    ), entry.warnings
    if "turned" in kind:
        assert (entry.width, entry.height) == (320, 256)
        assert "upright picture" in entry.warnings[0]


@pytest.mark.parametrize("kind", [name for name in DICOM if "Pixel" in name or "region" in name])
def test_a_shape_is_no_length(tmp_path: Path, kind: str) -> None:
    entry = measured(DICOM[kind](tmp_path / "a.dcm"))
    if kind == "a region of graphics":
        assert entry.spacing_mm == pytest.approx((0.2, 0.3)) and entry.pixel_aspect is None
        return
    assert entry.spacing_mm is None and entry.landmarks_mm is None
    assert entry.pixel_aspect[1] / entry.pixel_aspect[0] == pytest.approx(1.5)


# ---- Lost parts


def half_lost(data: bytes) -> bytes:
    """The second half is lost, but the end mark is there."""
    return data[: len(data) // 2] + b"\xff\xd9"


def jpeg_in_tiff(path: Path, data: bytes) -> Path:
    """A TIFF of one strip that is this JPEG."""
    rows, columns = GREY.shape
    tags = {256: columns, 257: rows, 258: 8, 259: 7, 262: 1, 273: 8, 277: 1, 278: rows}
    tags[279] = len(data)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, n) for tag, n in sorted(tags.items()))
    data += b"\0" * (len(data) % 2)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    path.write_bytes(head + data + struct.pack("<H", len(tags)) + entries + bytes(4))
    return path


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["plain", "progressive"])
@pytest.mark.parametrize("file", ["a.jpg", "a.dcm", "a.tif"])
def test_half_a_jpeg_is_refused_in_every_container(
    tmp_path: Path, file: str, options: dict
) -> None:
    def write(data: bytes) -> Path:
        path = tmp_path / file
        if file == "a.jpg":
            path.write_bytes(data)
        elif file == "a.tif":
            jpeg_in_tiff(path, data)
        else:
            in_dicom(path, data, GREY)
        return path

    data = jpeg(GREY, **options)
    assert measured(write(data)).status == "ok"
    with pytest.raises(ImageError, match=r"damaged|truncated"):
        open_image(write(half_lost(data)))
    starts = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    for start in starts[1:]:
        with pytest.raises(ImageError, match="truncated"):
            open_image(write(data[:start] + b"\xff\xd9"))


def test_half_a_lossless_jpeg_is_refused(tmp_path: Path) -> None:
    """GDCM reads on, and only prints a warning."""
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(tmp_path / "b.dcm"))
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG")
    writer.Execute(sitk.GetImageFromArray(GREY[None]))
    dataset = pydicom.dcmread(tmp_path / "b.dcm")
    whole = next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))
    assert measured(tmp_path / "b.dcm").status == "ok"
    dataset.PixelData = encapsulate([half_lost(whole.rstrip(b"\0"))])
    dataset.save_as(tmp_path / "b.dcm")
    readers = Readers()
    for opened in (None, readers):
        with pytest.raises(ImageError, match="damaged"):
            open_image(tmp_path / "b.dcm", opened)
    readers.end()


@pytest.mark.parametrize(
    "elements",
    [
        {"BitsAllocated": 8, "PixelData": WORDS.tobytes()},
        {"PixelData": TINTED.tobytes()},
        {"Rows": GREY.shape[0] // 2},
        {"Rows": GREY.shape[0] * 2},
    ],
    ids=["16 bits under 8", "colours under grey", "half the rows", "twice the rows"],
)
def test_a_header_that_describes_other_pixels_is_refused(tmp_path: Path, elements: dict) -> None:
    with pytest.raises(ImageError, match=r"its header describes|damaged"):
        open_image(dicom(tmp_path / "a.dcm", GREY, **elements))


def test_damage_that_a_decoder_does_not_mind_is_refused(tmp_path: Path) -> None:
    """RLE that unpacks to too much; JPEG 2000 with a part that was never written."""
    dataset = pydicom.dcmread(dicom(tmp_path / "a.dcm", GREY))
    dataset.compress(pydicom.uid.RLELossless)
    (packed,) = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
    boxes = cv2.imencode(".jp2", GREY, (cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000))[1].tobytes()
    stream = boxes[boxes.index(b"\xff\x4f\xff\x51") :]
    for syntax, data, damaged in (
        ("1.2.5", packed, packed[:5000] + packed[3000:]),
        ("1.2.4.90", stream, stream[:9000] + bytes(len(stream) - 9002) + b"\xff\xd9"),
    ):
        whole = dicom(tmp_path / "b.dcm", GREY, syntax, PixelData=encapsulate([data + bytes(20)]))
        assert measured(whole).status == "ok"
        with pytest.raises(ImageError, match="damaged"):
            open_image(dicom(whole, GREY, syntax, PixelData=encapsulate([damaged])))


def test_a_table_of_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="ModalityLUTSequence"):
        open_image(dicom(tmp_path / "a.dcm", GREY, ModalityLUTSequence=[pydicom.Dataset()]))
