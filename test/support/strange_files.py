"""Files for fuzz tests: valid ones of every variant, functions that damage them, strange images."""

import functools
import gzip
import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import pydicom
import tifffile

from test.support.image_files import (
    BIG,
    GREY,
    IMPLICIT,
    LITTLE,
    RGB,
    STACK,
    SYNTAXES,
    VOLUMES,
    H,
    W,
    dicom,
    makers,
    region,
    save,
    write,
)


@functools.cache
def valid() -> dict[str, bytes]:
    """Name -> bytes of a file of every format and variant; files of one image share a stem."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        for suffix in set(makers()) - set(VOLUMES):
            makers()[suffix](folder).rename(folder / f"grey{suffix}")
        for suffix in VOLUMES:
            for what, array in (("grey", GREY), ("stack", STACK), ("packed", STACK)):
                path = folder / f"{what}-of-{suffix[1:]}{suffix}"
                save(path, array, packed=what == "packed")
            save(folder / f"rgb-of-{suffix[1:]}{suffix}", RGB[None] / 3, vector=True)
        for suffix in (".png", ".bmp", ".tif", ".jpg"):
            write(folder / f"rgb{suffix}", RGB)
        write(folder / "progressive.jpg", GREY, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
        write(folder / "wide.png", np.dstack([RGB, GREY]).astype(np.uint16) * 200)
        write(folder / "real.tif", GREY.astype(np.float32))
        for packing in (5, 7, 8, 32773):
            write(folder / f"packed-{packing}.tif", RGB, cv2.IMWRITE_TIFF_COMPRESSION, packing)
        assert cv2.imwritemulti(str(folder / "stack.tif"), list(STACK))
        (folder / "big.tif").write_bytes(big_tiff())
        dicoms(folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def big_tiff() -> bytes:
    """A BigTIFF, whose pointers have 8 bytes; OpenCV does not write them."""
    at = 24 + 8 * 20 + 8  # offset of the pixels
    tags = ((256, W), (257, H), (258, 8), (259, 1), (262, 1), (273, at), (278, H), (279, H * W))
    head = struct.pack("<2s3H2Q", b"II", 43, 8, 0, 16, len(tags))
    entries = (struct.pack("<HH2Q", tag, 16, 1, number) for tag, number in tags)
    return head + b"".join(entries) + bytes(8) + GREY.tobytes()


def dicoms(folder: Path) -> None:
    for code in (LITTLE, IMPLICIT, BIG):
        path = folder / f"stack{SYNTAXES[code]}.dcm"
        wide = STACK.astype(np.uint16)
        regions = region(0.02, 0.03, code=code)
        dicom(path, wide, spacing="0.2\\0.3", regions=regions, number=1, code=code)
    dicom(folder / "bare.dcm", RGB[None], colours="RGB", preamble=False)
    jpeg = [cv2.imencode(".jpg", frame)[1].tobytes() for frame in (RGB, RGB[::-1])]
    for syntax in (".4.50", ".4.57", ".4.70", ".4.80", ".4.91"):
        path = folder / f"jpeg{syntax}.dcm"
        dicom(path, np.stack([RGB] * 2), "YBR_FULL_422", jpeg=jpeg, syntax=syntax)
    boxes = cv2.imencode(".jp2", GREY)[1].tobytes()
    jpeg_2000 = [boxes[boxes.index(b"\xff\x4f\xff\x51") :]]
    dicom(folder / "jpeg-2000.dcm", GREY[None], jpeg=jpeg_2000, syntax=".4.90")
    runs = [bytes([W - 1]) + row.tobytes() for row in GREY]
    rle = [struct.pack("<2I56x", 1, 64) + b"".join(runs)]
    dicom(folder / "rle.dcm", GREY[None], jpeg=rle, syntax=".5")


WORDS = (
    b"0 1 -1 2 3 31 4096 65536 2147483647 4294967295 9999999999999999999 1e308 -1e-308 nan inf x"
)
LINES = b"""HeaderSize = -1|ElementNumberOfChannels = 3|CompressedData = True|BinaryData = False
CompressedDataSize = 9999999|BinaryDataByteOrderMSB = 1|ElementType = MET_DOUBLE
ElementType = MET_NONE|ElementDataFile = LIST|ElementDataFile = %d 1 9999999 1
ElementDataFile = x.raw|ElementDataFile = .|type: double|type: block|encoding: gzip|encoding: hex
ElementDataFile = %s%n 1 5 1|data file: %s%d 1 5 1|endian: big|line skip: 99999999
byte skip: -1|data file: LIST|data file: .|dimension: 16|sizes: 40 60
kinds: vector domain domain""".replace(b"\n", b"|").split(b"|")


def extreme(n: int) -> bytes:
    """The n-th extreme number in 1 to 8 bytes of either order: integer limits, NaN, infinity."""
    size = 2 ** (n % 4)
    top = 256**size
    number = (0, 1, top // 2 - 1, top // 2, top - 1, top // 512 * 255, top // 4096 * 2047)[
        n // 4 % 7
    ]
    return number.to_bytes(size, "little" if n // 28 % 2 else "big")


def overwritten(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def word_changed(data: bytes, at: int, word: bytes) -> bytes:
    """Put a word in place of the next number in a text header."""
    found = re.compile(rb"[-.\d]+").search(data, at)
    return data if found is None else data[: found.start()] + word + data[found.end() :]


def line_changed(data: bytes, at: int, n: int) -> bytes:
    """Drop a line, repeat it, swap it with the next, or put a strange one before it."""
    lines = data.split(b"\n")
    line, rest = lines[at : at + 1], lines[at + 1 :]
    strange = LINES[n // 4 % len(LINES)]
    new = (rest, line + line + rest, rest[:1] + line + rest[1:], [strange, *line, *rest])
    return b"\n".join(lines[:at] + new[n % 4])


# kind of damage -> function of the bytes, the place and a number that varies the damage
DAMAGES: dict[str, Callable[[bytes, int, int], bytes]] = {
    "flip": lambda data, at, n: overwritten(data, at, bytes([data[at] ^ (n % 255 + 1)])),
    "number": lambda data, at, n: overwritten(data, at, extreme(n)),
    "cut": lambda data, at, n: data[:at],
    "drop": lambda data, at, n: data[:at] + data[at + n % 99 :],
    "double": lambda data, at, n: data[: at + n % 999] + data[at:],
    "insert": lambda data, at, n: data[:at] + bytes([n % 256]) * (n % 99) + data[at:],
    "word": lambda data, at, n: word_changed(data, at % 999, WORDS.split()[n % 16]),
    "line": lambda data, at, n: line_changed(data, at % 20, n),
}


def changed_inside(name: str, data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Change a file's content: packed data is unpacked before; a PNG gets right checksums after."""
    if data.startswith(b"\x1f\x8b"):
        return gzip.compress(change(gzip.decompress(data)), 1)
    if name.endswith(".zraw"):
        return zlib.compress(change(zlib.decompress(data)), 1)
    data = change(data)
    at = 8 if name.endswith(".png") else len(data)
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        data = data[:end] + struct.pack(">I", zlib.crc32(data[at + 4 : end])) + data[end + 4 :]
        at = end + 4
    return data


# ---- Damage within a valid structure


def fields(name: str, data: bytes) -> list[tuple[int, int]]:
    """Where the values of a file's structure lie: DICOM elements, TIFF tags, segments, chunks.

    Returns:
        offsets of the first byte and of the one behind the last.
    """
    suffix = name.rpartition(".")[2]
    if suffix == "dcm":
        return dicom_fields(data)
    if suffix == "tif":
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            tags = [tag for page in file.pages for tag in page.tags]
            found = [(tag.offset, tag.offset + 12) for tag in tags]  # code, type, count, value
            return found + [(tag.valueoffset, tag.valueoffset + tag.valuebytecount) for tag in tags]
    if suffix == "jpg":
        starts = [at for at in range(len(data) - 1) if data[at] == 255 and data[at + 1] > 0xBF]
        return list(zip(starts, [*starts[1:], len(data)], strict=True))
    if suffix == "png":
        at, found = 8, []
        while at + 12 <= len(data):
            length = int.from_bytes(data[at : at + 4], "big")
            found.append((at + 8, at + 8 + length))
            at += 12 + length
        return found
    lines = [match.span() for match in re.finditer(rb"[^\n]+\n", data[:2048])]  # of a text header
    return lines if len(lines) > 3 else [(at, at + 4) for at in range(0, min(len(data), 352), 4)]


def dicom_fields(data: bytes) -> list[tuple[int, int]]:
    """The values of all elements, those within sequences and fragments of pixels among them."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(io.BytesIO(data), force=True)
        for part in (dataset.file_meta, dataset):
            for tag in list(part.keys()):
                element = part.get_item(tag)
                if isinstance(element, pydicom.dataelem.RawDataElement) and element.length:
                    length = len(element.value or b"")
                    found.append((element.value_tell, element.value_tell + length))
    return found


def bits_flipped(name: str, data: bytes, which: int, n: int) -> bytes:
    """Flip a bit in a value of the structure, or put an extreme number there."""
    try:
        spans = [span for span in fields(name, data) if span[0] < span[1] <= len(data)]
    except Exception:  # an earlier change was too much for the libraries that look them up
        return data
    if not spans:
        return data
    start, end = spans[which % len(spans)]
    at = start + n % (end - start)
    if n % 3:
        return overwritten(data, at, bytes([data[at] ^ 1 << n % 8]))
    return overwritten(data, start, extreme(n // 3)[: end - start])


def with_a_hole(data: bytes, start: float, share: float) -> bytes:
    """Lose a part in the middle, as a transfer that was interrupted does."""
    first = round(len(data) * start)
    return data[:first] + data[first + round(len(data) * share) :]


# ---- Strange images

TYPES = {  # type of a value -> its name in MetaImage, its number in NIfTI
    **{"u1": ("UCHAR", 2), "i2": ("SHORT", 4), "u4": ("UINT", 768)},
    **{"f4": ("FLOAT", 16), "f8": ("DOUBLE", 64)},
}


def metaimage(kind: str, lengths: list[int], channels: int, world: list[float]) -> bytes:
    n, matrix = len(lengths), world * len(lengths)
    shown = [" ".join(map(str, x)) for x in (world[:n], world[-n:], matrix[: n * n], lengths)]
    return (
        f"ObjectType = Image\nNDims = {n}\nBinaryData = True\nOffset = {shown[0]}\n"
        f"ElementSpacing = {shown[1]}\nTransformMatrix = {shown[2]}\nDimSize = {shown[3]}\n"
        f"ElementNumberOfChannels = {channels}\nElementType = MET_{TYPES[kind][0]}\n"
        "ElementDataFile = LOCAL\n"
    ).encode()


def nifti(kind: str, lengths: list[int], channels: int, world: list[float]) -> bytes:
    sizes = [*lengths, *[1] * (4 - len(lengths)), channels, 1, 1]
    reals = np.resize(world, 28).astype("<f4").tobytes()
    head = struct.pack("<i36x8h14x", 348, 5, *(size % 2**15 for size in sizes))
    head += struct.pack(
        "<2h2x32sf8s", TYPES[kind][1], 8 * int(kind[1]), reals[:32], 352, reals[32:]
    )
    return head + struct.pack("<132x2h72s16x4s4x", 1, kind[0] == "f", reals[40:], b"n+1\0")


def by_library(path: Path, pixels: np.ndarray, world: list[float]) -> None:
    """Write (frames, H, W, 1 or 3) pixels as a DICOM file, or the first frame by OpenCV."""
    if path.suffix == ".tif":
        write(path, pixels[0])
    elif path.suffix != ".dcm":
        write(path, pixels[0].astype(np.uint8))
    elif pixels.shape[-1] == 3:
        dicom(path, pixels.astype(np.uint8), "RGB", spacing=f"{world[0]}\\{world[1]}")
    else:
        dicom(path, pixels[..., 0].astype(np.uint16), spacing=f"{world[0]}\\{world[1]}")


RAW = {".mha": metaimage, ".nii": nifti}
