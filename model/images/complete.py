"""Whether a volume's file holds as many pixels as its header claims.

ITK does not always find out: it fills up with zeros (NIfTI, packed MetaImage), or unpacks for ever
(frames of a packed MetaImage).
"""

import gzip
import math
import os
import re
import struct
import zlib
from pathlib import Path

from model.images.formats import head_of, is_gzip


def is_packed(path: Path, kind: str) -> bool:
    """Whether a MetaImage or NIfTI file is compressed."""
    if kind == "MetaImage":
        return re.search(rb"(?m)^CompressedData[ \t]*=[ \t]*[Tt1]", head_of(path)) is not None
    return kind == "NIfTI" and is_gzip(path)


def is_cut(path: Path, kind: str, needed: int) -> bool:
    """Whether pixels of so many bytes are not there; False where ITK sees that."""
    if kind == "NIfTI":
        return _is_cut_nifti(path)
    return is_packed(path, kind) and _is_cut_metaimage(path, needed)


def _is_cut_nifti(path: Path) -> bool:
    try:
        with (gzip.open if is_gzip(path) else open)(path, "rb") as file:
            head = file.read(352)
            order = "<" if 1 <= struct.unpack_from("<h", head, 40)[0] <= 7 else ">"
            dimensions, *lengths = struct.unpack_from(order + "8h", head, 40)
            (bits,) = struct.unpack_from(order + "h", head, 72)
            (start,) = struct.unpack_from(order + "f", head, 108)
            file.seek(int(start) + math.prod(lengths[:dimensions]) * bits // 8 - 1)
            return not file.read(1)
    except (EOFError, OSError, OverflowError, ValueError, zlib.error):  # impossible numbers too
        return True


def _is_cut_metaimage(path: Path, needed: int) -> bool:
    partner = re.search(rb"(?m)^ElementDataFile[ \t]*=[ \t]*(.*?)[ \t\r]*\n", head_of(path))
    if partner is None:
        return True
    inside = partner[1] == b"LOCAL"
    unpack = zlib.decompressobj(wbits=47)  # gzip or zlib
    try:
        with (path if inside else path.parent / os.fsdecode(partner[1])).open("rb") as file:
            file.seek(partner.end() if inside else 0)
            while needed > 0 and (data := unpack.unconsumed_tail or file.read(2**20)):
                needed -= len(unpack.decompress(data, 2**24))
                if unpack.eof:
                    break
    except (OSError, ValueError, zlib.error):  # a name that no file can have is a ValueError
        return True
    return needed > 0
