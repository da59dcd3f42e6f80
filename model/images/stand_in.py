"""A file in the place of one that ITK refuses though its pixels can be read."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from model.images.formats import is_gzip

# What to strike, and how often, in a file whose pixels ITK refuses because of the geometry.
_GEOMETRY = {
    "MetaImage": (rb"(?m)^(?:Element(?:Spacing|Size)|TransformMatrix)[ \t]*=.*\n", 3),
    "NRRD": (rb"(?m)^space[a-z ]*:.*\n", 5),
}


@contextmanager
def acceptable(path: Path, kind: str, without_geometry: bool) -> Iterator[Path]:
    """The file, or one that stands in for it where ITK refuses its name or its geometry."""
    if kind != "NIfTI" and not without_geometry:
        yield path
        return
    with TemporaryDirectory() as folder:
        stand_in = Path(folder) / ("a.nii.gz" if is_gzip(path) else "a.nii")
        if kind == "NIfTI":  # alone is refused where the suffix is not its own
            stand_in.symlink_to(path.absolute())
        else:
            stand_in.write_bytes(_strike_geometry(path, kind))
        yield stand_in


def _strike_geometry(path: Path, kind: str) -> bytes:
    pattern, count = _GEOMETRY[kind]
    data = re.sub(pattern, b"", path.read_bytes(), count=count)
    if kind != "MetaImage":
        return data
    beside = os.fsencode(path.absolute().parent) + b"/"  # where an .mhd has its pixels
    partner = rb"(?m)^(ElementDataFile[ \t]*=[ \t]*)(?![ \t]|LOCAL|LIST|/)"
    return re.sub(partner, lambda match: match[1] + beside, data, count=1)
