"""DICOM: one image, or a loop whose frames are read one at a time.

GDCM, with which SimpleITK reads DICOM, unpacks all frames of a file at once and does not pass on
what an ultrasound machine says of its pixels' size. So the header is read here, and GDCM gets a
file for each frame, with those elements alone that tell of pixels: a loop takes the memory of one
frame, a damaged frame costs no other, and nothing that names a patient goes any further.

Values are as stored, after RescaleSlope and RescaleIntercept. WindowCenter is left alone: it says
what a viewer showed, and may cut values off.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from model.images.dicom_frames import BITS, FRAMES, JPEG, NATIVE, RLE, ROOT, SAMPLES, find_frames
from model.images.elements import PIXELS, DataSet, open_data_set
from model.images.limits import ImageError, ImageFile, Raw, damaged, unreadable
from model.images.placing import dicom_spacing

_INSTANCE_NUMBER = 0x00200013
_READABLE = {"", f"{ROOT}.1.99", RLE, *JPEG, *NATIVE.values()}  # "" without a header
_NAMES = {
    ".4.10": "video",
    ".4.11": "JPEG XL",
    ".4.20": "High-Throughput JPEG 2000",
    ".5": "RLE of colours with more than 8 bits",
}


def open_dicom(path: Path, open_one: Callable[[Path], ImageFile]) -> ImageFile:
    """A DICOM file of one frame or several; `open_one` opens those of one."""
    try:
        with open_data_set(path) as (syntax, data):
            _check(syntax, data)
            count = max(1, int(_first(data, FRAMES, 1)))
            frames = find_frames(path, syntax, data, count)
            spacing_mm, warnings = dicom_spacing(data)
            number = _first(data, _INSTANCE_NUMBER, math.inf)
    except RecursionError as error:  # sequences in sequences in sequences
        raise damaged("DICOM") from error
    with frames.header() as file:
        whole = open_one(file)

    def read(k: int) -> Raw:
        try:
            with frames.single_frame(k) as file:
                frame = open_one(file)
                if frame.size != whole.size:  # a JPEG of another size than the header's
                    raise damaged("DICOM")
                return frame.open()(0)
        except OSError as error:  # it is gone, or there is no room for a copy of the frame
            raise unreadable(error) from error

    geometry = replace(whole.geometry, spacing_mm=spacing_mm)
    return ImageFile(count, whole.size, lambda: read, geometry, count > 1, warnings, number)


def _check(syntax: str, data: DataSet) -> None:
    """
    Raises:
        ImageError: there are no pixels, or they are packed in a way that GDCM does not know.
    """
    if PIXELS not in data.elements:
        if data.is_whole:
            raise ImageError("the DICOM file holds no pixels: it is no image, or cut off")
        raise damaged("DICOM")
    deep = (data.number(SAMPLES) or 0) > 1 and (data.number(BITS) or 0) > 8
    if syntax in _READABLE and not (syntax == RLE and deep):  # whose bytes GDCM mixes up
        return
    # A damaged header may have anything in this place.
    known = re.fullmatch(re.escape(ROOT) + r"(\.\d{1,3}){1,3}", syntax)
    name = next((f" ({n})" for part, n in _NAMES.items() if syntax.startswith(ROOT + part)), "")
    raise ImageError(
        f"the transfer syntax {syntax if known else 'of the file'}{name} cannot be read: save the "
        "file without compression, as gdcmconv --raw or dcmdjpeg do, or its frames as .png"
    )


def _first(data: DataSet, tag: int, default: float) -> float:
    """The first number of a value, or another where it is none."""
    values = data.decimals(tag)
    return values[0] if values and math.isfinite(values[0]) else default
