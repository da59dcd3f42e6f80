"""DICOM headers: the size of a pixel, its place in the world, and that nothing names a patient."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from model.images.source import ImageError, open_image
from test.model.test_dicom import CODES, jpeg
from test.support.image_files import (
    BIG,
    GREY,
    IMPLICIT,
    LITTLE,
    RGB,
    STACK,
    assert_stack,
    dicom,
    element,
    item,
    left_open,
    region,
    single,
)

pytestmark = pytest.mark.filterwarnings("error")
ROOT = Path(__file__).resolve().parents[2]


# ---- The size of a pixel


def spacing_of(path: Path) -> tuple[float, float] | None:
    return single(path).geometry.spacing_mm


@CODES
def test_spacing(tmp_path: Path, code: tuple[str, bool]) -> None:
    def spacing(*regions: bytes, mm: str = "", **tags: object) -> tuple[float, float] | None:
        path = tmp_path / "a.dcm"
        inside = b"".join(regions)
        one = spacing_of(dicom(path, GREY[None], regions=inside, spacing=mm, code=code, **tags))
        more = {0x00186011: left_open(0x00186011, list(regions), code)} if regions else {}
        assert one == spacing_of(dicom(path, GREY[None], more=more, spacing=mm, code=code, **tags))
        return one

    def of(x: float, y: float, **units: int) -> bytes:
        return region(x, y, code=code, **units)

    expected = pytest.approx((0.2, 0.3))
    assert spacing() is None
    assert spacing(mm="0.5\\0.25") == (0.25, 0.5)  # the tag gives rows first
    assert spacing(mm="1\\1") == (1.0, 1.0)
    assert spacing(of(0.02, 0.03)) == expected
    assert spacing(of(0.02, -0.03)) == expected  # an axis that points upwards
    assert spacing(of(0.02, 0.03), of(0.02000001, 0.03)) == expected
    assert spacing(of(0.1, 0.1, unit=4), of(0.02, 0.03), of(0.0, 0.0)) == expected
    assert spacing(of(0.02, 0.03), preamble=False) == expected
    assert spacing(of(0.02, 0.03, unit=4)) is None
    assert spacing(of(0.02, 0.03, y_unit=4)) is None
    assert spacing(of(0.0, 0.03)) is None
    assert spacing(of(float("nan"), 0.03)) is None
    assert spacing(of(0.02, 0.03), mm="0.5\\0.25") == (0.25, 0.5)
    assert spacing(of(0.02, 0.03), mm="1\\1") == expected  # most writers of 1 x 1 do not know


def test_regions_that_differ(tmp_path: Path) -> None:
    regions = region(0.02, 0.03) + region(0.04, 0.03)
    frame = single(dicom(tmp_path / "a.dcm", GREY[None], regions=regions))
    assert frame.geometry.spacing_mm is None
    assert "regions differ" in frame.warnings[0] and "px only" in frame.warnings[0]


def test_regions_behind_a_long_header(tmp_path: Path) -> None:
    """Private data, and an icon with pixels of its own, which are not the image's."""
    icon = element(0x00280010, "US", 64) + element(0x7FE00010, "OW", bytes(64 * 64))
    packed = struct.pack("<HH2s2xI", 0x7FE0, 0x10, b"OB", 0xFFFFFFFF) + item(b"") + item(jpeg(RGB))
    packed += struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    for inside in (icon, packed):
        more = {
            0x00091001: element(0x00091001, "OB", bytes(3 * 2**20)),
            0x00091002: left_open(0x00091002, [item(region(0.5, 0.5)), item(inside)]),
            0x00182222: left_open(0x00182222, [item(element(0x00280030, "DS", "7\\7"))]),
            0x00880200: left_open(0x00880200, [item(inside)]),
        }
        path = dicom(tmp_path / "a.dcm", STACK, regions=region(0.02, 0.03), more=more)
        behind = element(0x00280030, "DS", "7\\7") + element(0xFFFCFFFC, "OB", bytes(9))
        path.write_bytes(path.read_bytes() + behind)
        assert_stack(path, STACK)
        assert open_image(path).geometry.spacing_mm == pytest.approx((0.2, 0.3))


def test_sequences_in_sequences_without_end(tmp_path: Path) -> None:
    inside = struct.pack("<HH2s2xI", 0x0008, 0x1140, b"SQ", 2**32 - 1)
    inside += struct.pack("<HHI", 0xFFFE, 0xE000, 2**32 - 1)
    path = dicom(tmp_path / "a.dcm", GREY[None], more={0x00081140: inside * 20000})
    with pytest.raises(ImageError, match="DICOM data is damaged"):
        open_image(path)


def test_regions_of_unknown_kind(tmp_path: Path) -> None:
    """An archive that does not know the tag passes them on like this."""
    inside = region(0.02, 0.03, code=IMPLICIT)
    for value in (
        element(0x00186011, "UN", inside),
        left_open(0x00186011, [inside], IMPLICIT)[:4]
        + b"UN\0\0"
        + left_open(0x00186011, [inside], IMPLICIT)[4:],
    ):
        path = dicom(tmp_path / "a.dcm", GREY[None], more={0x00186011: value})
        assert spacing_of(path) == pytest.approx((0.2, 0.3))


@pytest.mark.parametrize("group", [0x52009229, 0x52009230])
def test_spacing_of_enhanced_files(tmp_path: Path, group: int) -> None:
    measures = element(0x00289110, "SQ", item(element(0x00280030, "DS", "0.5\\0.25")))
    more = {group: element(group, "SQ", item(measures))}
    more[0x00080016] = element(0x00080016, "UI", "1.2.840.10008.5.1.4.1.1.6.2")
    path = dicom(tmp_path / "a.dcm", STACK, more=more)
    assert_stack(path, STACK)
    assert open_image(path).geometry.spacing_mm == (0.25, 0.5)


def test_lengths_outside_the_body_are_not_taken(tmp_path: Path) -> None:
    """Lengths on a detector and on scanned film, and the ratio of a pixel's sides."""
    for tag, kind, value in (
        (0x00181164, "DS", "0.5\\0.25"),
        (0x00182010, "DS", "0.5\\0.25"),
        (0x00280034, "IS", "3\\2"),
    ):
        for of_class in ("7", "1", "3.1", "12.1"):
            more = {
                tag: element(tag, kind, value),
                0x00080016: element(0x00080016, "UI", "1.2.840.10008.5.1.4.1.1." + of_class),
            }
            assert spacing_of(dicom(tmp_path / "a.dcm", GREY[None], more=more)) is None


@pytest.mark.parametrize("spacing", ["0\\0", "abc", "-1\\1", "0.5", "1e9\\1", "nan\\1"])
def test_spacing_that_cannot_be(tmp_path: Path, spacing: str) -> None:
    path = dicom(tmp_path / "a.dcm", STACK, spacing=spacing)
    assert_stack(path, STACK)
    frame = next(open_image(path).frames())
    assert frame.geometry.spacing_mm is None and "is impossible" in frame.warnings[0]
    assert len(frame.warnings) == 1


@pytest.mark.parametrize("shape", ["0\\1", "3", "x\\y", "-3\\2", "100\\1"])
def test_shape_that_cannot_be(tmp_path: Path, shape: str) -> None:
    more = {0x00280034: element(0x00280034, "IS", shape)}
    frame = single(dicom(tmp_path / "a.dcm", GREY[None], more=more))
    assert frame.geometry.spacing_mm is frame.geometry.aspect is None
    assert frame.warnings == ("the header's PixelAspectRatio is impossible: it is left out",)
    more[0x00182010] = element(0x00182010, "DS", "0.6\\0.4")  # as it was scanned
    frame = single(dicom(tmp_path / "a.dcm", GREY[None], more=more))
    assert frame.geometry.aspect == (0.4, 0.6) and len(frame.warnings) == 1


@pytest.mark.parametrize("of_class", ["3.1", "6.1", "7", "1", "7.2", "4.1", "77.1.4"])
def test_place_in_the_world(tmp_path: Path, of_class: str) -> None:
    """The same place as ITK's, which takes another spacing for each kind of image."""
    more = {
        0x00080016: element(0x00080016, "UI", "1.2.840.10008.5.1.4.1.1." + of_class),
        0x00180088: element(0x00180088, "DS", "2"),
        0x00181164: element(0x00181164, "DS", "0.7\\0.6"),
        0x00182010: element(0x00182010, "DS", "0.9\\0.8"),
        0x00200032: element(0x00200032, "DS", "1\\-2\\3"),
        0x00200037: element(0x00200037, "DS", "0\\1\\0\\0\\0\\1"),
    }
    for spacing in ("0.5\\0.25", ""):
        path = dicom(tmp_path / "a.dcm", STACK, spacing=spacing, more=more)
        image = sitk.ReadImage(str(path))
        for frame in open_image(path).frames():
            expected = image.TransformIndexToPhysicalPoint((7, 11, frame.slice_index))
            world = frame.geometry.to_world([[7, 11]], frame.slice_index)
            np.testing.assert_allclose(world[0], expected, atol=1e-5)
            assert frame.geometry.spacing_mm == ((0.25, 0.5) if spacing else None)
        assert frame.slice_index == 4


# ---- Nothing names a patient

SECRETS = {
    0x00080018: ("UI", "1.2.826.0.1.3680043.55.777"),
    0x00080020: ("DA", "20240917"),
    0x00080050: ("SH", "ACC-4711-XY"),
    0x00080080: ("LO", "St. Elsewhere Clinic"),
    0x00081070: ("PN", "OPERATOR^Olga"),
    0x00100010: ("PN", "ROE^Josephine"),
    0x00100020: ("LO", "PID-0815-77"),
    0x00100030: ("DA", "19910228"),
    0x00104000: ("LT", "lives at Baker Street"),
    0x00181000: ("LO", "SERIAL-90210"),
    0x0020000D: ("UI", "1.2.826.0.1.3680043.55.778"),
    0x00204000: ("LT", "comment about Josephine"),
    0x00284000: ("LT", "presented to Dr. Watson"),
    0x00091001: ("UN", "private note of Watson"),
    0x00880140: ("UI", "1.2.826.0.1.3680043.55.779"),
}
WORDS = (
    *(b"3680043.55", b"20240917", b"ACC-4711", b"Elsewhere", b"OPERATOR", b"ROE^", b"Josephine"),
    *(b"PID-0815", b"19910228", b"1.991022", b"1.99102e", b"Baker Street", b"SERIAL-9", b"Watson"),
)


def secret(path: Path, pixels: np.ndarray, *args: object, **named: object) -> Path:
    code = named.get("code", LITTLE)
    more = {tag: element(tag, *value, code) for tag, value in SECRETS.items()}
    return dicom(path, pixels, *args, more=more | named.pop("more", {}), **named)


def spoiled(data: bytes) -> dict[str, bytes]:
    """Versions of a file with damage of all kinds: text stands in place of other values."""
    name = data.index(element(0x00100010, *SECRETS[0x00100010]))
    syntax = data.index(b"1.2.840.10008.1.2.1")
    pixels = data.index(b"\xe0\x7f\x10\0")
    versions = {f"cut{at}": data[:at] for at in (200, name + 12, pixels, pixels + 300)}
    for length in (0, 2, 200, 60000):
        at = name + 6
        versions[f"length{length}"] = data[:at] + struct.pack("<H", length) + data[at + 2 :]
    versions["kind"] = data[: name + 4] + b"??" + data[name + 6 :]
    versions["longkind"] = data[: name + 4] + b"SQ" + data[name + 6 :]
    for name, value in (("video", b".4.102"), ("patient", b"ROE^Josephine 19910228")):
        uid = element(0x00020010, "UI", b"1.2.840.10008.1.2" * (name == "video") + value)
        old = element(0x00020010, "UI", data[syntax : syntax + 19])
        versions[name] = data.replace(old, uid)
    for tag, kind in (
        *((0x00280004, "CS"), (0x00280008, "IS"), (0x00280030, "DS"), (0x00200013, "IS")),
        *((0x00080016, "UI"), (0x00280010, "US"), (0x00186011, "SQ")),
    ):
        start = data.index(struct.pack("<HH", tag >> 16, tag & 0xFFFF))
        end = start + 8 + struct.unpack_from("<H", data, start + 6)[0]
        if kind == "SQ":
            end = start + 12 + struct.unpack_from("<I", data, start + 8)[0]
        for k, text in enumerate((b"ROE^Josephine 19910228", b"19910228\\19910228")):
            versions[f"{tag:x}-{k}"] = data[:start] + element(tag, kind, text) + data[end:]
    return versions


@pytest.mark.slow
def test_no_answer_or_message_names_a_patient(tmp_path: Path) -> None:
    source, out, temporary = (tmp_path / name for name in ("in", "out", "tmp"))
    source.mkdir()
    temporary.mkdir()
    good = secret(
        source / "good.dcm",
        *(GREY[None], "MONOCHROME2", "0.5\\0.25"),
        regions=region(0.02, 0.03),
        number=4,
    )
    for name, data in spoiled(good.read_bytes()).items():
        (source / f"{name}.dcm").write_bytes(data)
    assert all(word in good.read_bytes() for word in WORDS if b"1.99" not in word)
    colours, parts = np.stack([RGB, RGB]), [jpeg(RGB), jpeg(RGB)[:500]]
    secret(source / "jpeg.dcm", colours, "YBR_FULL_422", jpeg=parts)
    secret(source / "old.dcm", GREY[None], code=IMPLICIT, preamble=False)
    secret(source / "big.dcm", GREY[None], code=BIG)
    command = [sys.executable, "process.py", "--input", source, "--output", out]
    environment = {"TMPDIR": str(temporary), "PATH": "/usr/bin:/bin"}
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment, check=False)
    assert ran.returncode == 1 and ran.stderr.count(b"\n") == 1
    written = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    assert len(written) > 20 and not list(temporary.iterdir())
    for text in (ran.stdout, ran.stderr, *written):
        assert not [word for word in WORDS if word in text]
    cases = json.loads((out / "results.json").read_text())["cases"]
    answered = {(case["file"], case["frame"]) for case in cases if case["status"] == "ok"}
    assert {("good.dcm", None), ("old.dcm", None), ("big.dcm", None), ("jpeg.dcm", 0)} <= answered
    assert ("jpeg.dcm", 1) not in answered and len(answered) < len(cases) - 10
    assert len({case["error"] for case in cases}) > 3
