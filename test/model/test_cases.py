"""The cases that each input layout holds, and the names they get."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from model.images.formats import format_of
from model.images.source import GreyFrame, ImageError, open_image
from model.pipeline.cases import LONGEST_NAME, InputCase, InputError, find_cases, printable_path
from test.support.image_files import GREY


def touch(root: Path, *names: str | bytes) -> Path:
    for name in names:
        path = Path(os.fsdecode(os.fsencode(root) + b"/" + os.fsencode(name)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def write_dicom(path: Path, kind: str = "file") -> None:
    """A DICOM image by pydicom; without preamble and marks unless it is a "file" or "directory"."""
    data = pydicom.Dataset()
    data.SpecificCharacterSet = "ISO_IR 100"
    data.ImageType = ["ORIGINAL", "PRIMARY"]
    if kind == "ACR-NEMA":
        data.RecognitionCode = "ACR-NEMA 2.0"
    else:
        data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.6.1", "1.2.3"
    if kind == "directory":
        data.SOPClassUID = "1.2.840.10008.1.3.10"
    data.Rows, data.Columns = GREY.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.PixelData = GREY.tobytes()
    data["PixelData"].VR = "OB"
    syntax = {"implicit": ImplicitVRLittleEndian, "big endian": ExplicitVRBigEndian}.get(
        kind, ExplicitVRLittleEndian
    )
    if kind in ("file", "directory"):
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = syntax
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
        data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
        pydicom.dcmwrite(path, data, enforce_file_format=True)
    else:
        pydicom.dcmwrite(
            path, data, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian
        )


def write_job(root: Path, relative: object = "images/us", key: str = "socket", **more) -> Path:
    image = {"slug": "us", "relative_path": relative, "super_kind": "Image", **more}
    root.mkdir(parents=True, exist_ok=True)
    values = [
        {key: {"slug": "age", "relative_path": "age.json", "super_kind": "Value"}, "value": 31},
        {"image": {"name": "x.mha"}, "value": None, key: image},
        {key: {"slug": "report", "relative_path": "report.pdf", "super_kind": "File"}},
        {"value": "of a socket that does not say what it is"},
    ]
    (root / "inputs.json").write_text(json.dumps(values))
    return root


def names(cases: list[InputCase]) -> list[str]:
    assert all(case.folder == case.name and not case.is_job for case in cases)
    return [case.name for case in cases]


# ---- Layout 1


@pytest.mark.parametrize("key", ["socket", "interface"])
@pytest.mark.parametrize("name", ["0e1f.mha", "0e1f.tif", "0e1f.tiff", "0e1f.MHA"])
def test_job_of_one_file(tmp_path: Path, key: str, name: str) -> None:
    touch(write_job(tmp_path, key=key), f"images/us/{name}", "images/other/no.mha", "no.png")
    file = f"images/us/{name}"
    assert find_cases(tmp_path) == [InputCase("images/us", tmp_path / file, file, "", is_job=True)]


@pytest.mark.parametrize("root_is_link", [False, True])
def test_job_below_a_link(tmp_path: Path, root_is_link: bool) -> None:
    real = touch(tmp_path / "real", "a.mha")
    root = write_job(tmp_path / "in")
    (root / "images").mkdir()
    (root / "images" / "us").symlink_to(real)
    if root_is_link:
        root = tmp_path / "link"
        root.symlink_to(tmp_path / "in")
    (case,) = find_cases(root)
    assert case.path == root / "images/us/a.mha" and case.file == "images/us/a.mha"


@pytest.mark.parametrize("folder", ["images/us", "images/us/0e1f"])
def test_job_of_a_dicom_folder(tmp_path: Path, folder: str) -> None:
    touch(write_job(tmp_path), f"{folder}/1.dcm", f"{folder}/2.dcm")
    (case,) = find_cases(tmp_path)
    assert (case.path, case.file, case.folder) == (tmp_path / folder, folder, "")


def test_hidden_files_do_not_hide_a_jobs_image(tmp_path: Path) -> None:
    touch(write_job(tmp_path), "images/us/._a.mha", "images/us/.DS_Store", "images/us/a.mha")
    assert find_cases(tmp_path)[0].path.name == "a.mha"


def test_job_that_names_the_file_itself(tmp_path: Path) -> None:
    touch(write_job(tmp_path, "images/us/a.mha"), "images/us/a.mha")
    assert find_cases(tmp_path)[0].path == tmp_path / "images/us/a.mha"


@pytest.mark.parametrize("inside", [None, [], ["a.mha", "b.mha"]])
def test_job_without_its_image_is_a_case_that_fails(tmp_path: Path, inside: list | None) -> None:
    write_job(tmp_path)
    if inside is not None:
        (tmp_path / "images/us").mkdir(parents=True)
        touch(tmp_path / "images/us", *inside)
    (case,) = find_cases(tmp_path)
    with pytest.raises(ImageError):
        open_image(case.path)


@pytest.mark.parametrize("path", ["/etc", "..", "../in", "images/../../x", "images/us/.."])
def test_refused_paths(tmp_path: Path, path: str) -> None:
    with pytest.raises(InputError, match=r"relative_path .* leaves the input folder"):
        find_cases(write_job(tmp_path, path))


@pytest.mark.parametrize("path", ["a" * 300, "a/" * 3000, "loop", "images/us/a.mha/b"])
def test_job_whose_path_no_file_can_have_is_a_case_that_fails(tmp_path: Path, path: str) -> None:
    touch(write_job(tmp_path, path), "images/us/a.mha")
    (tmp_path / "loop").symlink_to("loop")
    (case,) = find_cases(tmp_path)
    with pytest.raises(ImageError, match="the file cannot be read"):
        open_image(case.path)


@pytest.mark.parametrize("path", [None, "", 3, ["images"], "a\0b", "a\nb", "\ud800"])
def test_unusable_paths(tmp_path: Path, path: object) -> None:
    with pytest.raises(InputError, match="no usable relative_path"):
        find_cases(write_job(tmp_path, path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b"[{'socket': 1}]", "cannot be read as JSON"),
        (b'[{"socket"', "cannot be read as JSON"),
        (b"\xff\xfe[]", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[1" + b"0" * 5000 + b"]", "cannot be read as JSON"),
        (b"{}", "a list of values"),
        (b"[]", "found none"),
        (b'[1, null, {"socket": null}, {"socket": [2]}, {"socket": {}}]', "found none"),
        (b'[{"socket": {"super_kind": "Value", "relative_path": "x"}}]', "found none"),
    ],
)
def test_unusable_inputs_json(tmp_path: Path, text: bytes, message: str) -> None:
    (touch(tmp_path, "images/us/a.mha") / "inputs.json").write_bytes(text)
    with pytest.raises(InputError, match=f"inputs.json.*{message}"):
        find_cases(tmp_path)


def test_two_images_in_a_job_are_named(tmp_path: Path) -> None:
    sockets = [{"socket": {"slug": slug, "super_kind": "Image"}} for slug in ("left", "right")]
    (tmp_path / "inputs.json").write_text(json.dumps(sockets))
    with pytest.raises(InputError, match="found left, right"):
        find_cases(tmp_path)


def test_inputs_json_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = write_job(tmp_path) / "inputs.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert find_cases(tmp_path)[0].is_job


# ---- Layouts 2 and 3


def test_images_folder(tmp_path: Path) -> None:
    touch(tmp_path, "images/pelvic-2d-ultrasound/0e1f.mha", "images/b/c/d.tif", "age.json")
    cases = find_cases(tmp_path)
    assert names(cases) == ["images__b__c__d", "images__pelvic-2d-ultrasound__0e1f"]
    assert cases[1].file == "images/pelvic-2d-ultrasound/0e1f.mha"


def test_images_outside_the_images_folder_are_cases_too(tmp_path: Path) -> None:
    touch(tmp_path, "top.png", "other/x.png", "images/p1/y.png")
    assert names(find_cases(tmp_path)) == ["images__p1__y", "other__x", "top"]


def test_images_folder_without_a_slug_is_any_folder(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.png", "more/b.png", "c.png")
    assert names(find_cases(tmp_path)) == ["c", "images__a", "more__b"]


def test_any_folder(tmp_path: Path) -> None:
    touch(tmp_path, "z.png", "a/b/c.nii.gz", "a/x.y.JPG", "D.DCM", "e.mhd", "e.raw")
    touch(tmp_path, "notes.txt", "a/landmarks.csv", "no-suffix", ".hidden.png", ".cache/f.png")
    cases = find_cases(tmp_path)
    assert names(cases) == ["D", "a__b__c", "a__x.y", "e", "z"]
    assert [case.file for case in cases][1] == "a/b/c.nii.gz"
    assert [case.path for case in cases] == [tmp_path / case.file for case in cases]


def test_dicom_without_a_suffix_and_what_is_skipped(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "loop.AVI", "sub/b.avi", "letter", "e.mhd", "e.raw", ".hidden")
    (tmp_path / "IM_0001").write_bytes(bytes(128) + b"DICM")
    skipped: dict[str, list[str]] = {}
    cases = find_cases(tmp_path, skipped=skipped)
    assert names(cases) == ["IM_0001", "a", "e"]
    assert skipped == {".avi": ["loop.AVI", "sub/b.avi"], "no suffix": ["letter"]}


KINDS = ["file", "no preamble", "implicit", "big endian"]


@pytest.mark.parametrize(
    "name", ["US.1.2.840.113619.2.5.17", "x.dicom", "x.IMA", "x.1", "IM_0001", "1.2.3.4", "x.dcm"]
)
@pytest.mark.parametrize("kind", [*KINDS, "ACR-NEMA"])
def test_dicom_of_any_name_is_found_by_content(tmp_path: Path, name: str, kind: str) -> None:
    write_dicom(tmp_path / name, kind)
    (case,) = find_cases(tmp_path)
    assert case.name == name.removesuffix(".dcm") and case.path == tmp_path / name
    assert format_of(case.path) == "DICOM"


@pytest.mark.parametrize("kind", KINDS)
def test_dicom_of_any_name_is_read(tmp_path: Path, kind: str) -> None:
    write_dicom(tmp_path / "US.1.2.17", kind)
    (frame,) = open_image(tmp_path / "US.1.2.17").frames()
    assert isinstance(frame, GreyFrame)
    np.testing.assert_array_equal(frame.pixels, GREY)


def test_dicom_of_like_names_stays_apart(tmp_path: Path) -> None:
    for name in ("a.dcm", "a.dicom", "a", "a.1"):
        write_dicom(tmp_path / name)
    assert {case.file: case.name for case in find_cases(tmp_path)} == {
        **{"a": "a", "a.1": "a.1", "a.dcm": "a-2", "a.dicom": "a.dicom"}
    }


NO_IMAGES = {
    "letter.txt": b"\b\0 1.2.840.10008.5.1.4.1.1.6.1",
    "a.json": b'{"0008": "1.2.840.10008.1.2"}',
    "a.xml": b"<?xml version='1.0'?><DicomAttribute tag='00080016'>1.2.840.10008.1.2.1",
    "a.csv": b"Filename,PS1\n",
    "a.pdf": b"%PDF-1.7\n",
    "a.zip": b"PK\x03\x04" + b"\x08\0" * 100,
    "a.ini": b"[DICM]\n" * 30,
    "Thumbs.db": b"\xd0\xcf\x11\xe0" + bytes(300),
    "a.17": b"\x08\0\x08\0" * 100,
    "short": b"\x08\0",
    "empty": b"",
}


def test_what_is_no_dicom_is_passed_over_and_named(tmp_path: Path) -> None:
    for name, content in NO_IMAGES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "pixels.raw").write_bytes(bytes(128) + b"DICM")
    write_dicom(tmp_path / ".hidden")
    write_dicom(tmp_path / "DICOMDIR")
    write_dicom(tmp_path / "index.17", "directory")
    touch(tmp_path, "a.png")
    (tmp_path / "pipe").symlink_to(tmp_path / "real-pipe")
    os.mkfifo(tmp_path / "real-pipe")
    skipped: dict[str, list[str]] = {}
    assert names(find_cases(tmp_path, skipped=skipped)) == ["a"]
    bare = ["DICOMDIR", "a.17", "empty", "index.17", "pipe", "real-pipe", "short"]
    assert skipped.pop("no suffix") == bare
    assert skipped == {
        Path(name).suffix: [name] for name in NO_IMAGES if Path(name).suffix[1:2].isalpha()
    }


def test_a_jobs_folder_of_dicom_of_any_name(tmp_path: Path) -> None:
    touch(write_job(tmp_path), "images/us/notes.txt")
    write_dicom(tmp_path / "images/us/IM.1.2.17")
    assert find_cases(tmp_path)[0].path == tmp_path / "images/us/IM.1.2.17"
    write_dicom(tmp_path / "images/us/IM.1.2.18", "implicit")
    (case,) = find_cases(tmp_path)
    assert case.path == tmp_path / "images/us" and open_image(case.path).frame_count == 2


def test_colliding_names_get_numbers(tmp_path: Path) -> None:
    files = ["a.png", "a.jpg", "a-2.png", "a/b.png", "a__b.png", "a/b.nii", "a/b.nii.gz"]
    touch(tmp_path, *files)
    cases = find_cases(tmp_path)
    assert {case.file: case.name for case in cases} == {
        "a-2.png": "a-2",
        "a.jpg": "a",
        "a.png": "a-3",
        "a/b.nii": "a__b",
        "a/b.nii.gz": "a__b-2",
        "a/b.png": "a__b-3",
        "a__b.png": "a__b-4",
    }


def test_no_case_is_named_like_a_result(tmp_path: Path) -> None:
    touch(tmp_path, "results.json.png", "landmarks.csv.jpg", "inputs.json.png")
    found = names(find_cases(tmp_path))
    assert found == ["inputs.json", "landmarks.csv-2", "results.json-2"]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "deep/x.png")
    root = touch(tmp_path / "in", "a/1.png")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "self.png").symlink_to("self.png")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "c.png").symlink_to(tmp_path / "gone.png")
    cases = find_cases(root)
    assert names(cases) == ["a__1", "a__self", "b__deep__x", "c"]
    for case in (cases[1], cases[3]):  # links that lead nowhere
        with pytest.raises(ImageError, match="cannot be read"):
            open_image(case.path)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    touch(tmp_path, b"\xff.png", b"\xfe.png", "line\nbreak.png", "é ü.png", '"quoted", .png')
    cases = find_cases(tmp_path)
    assert len({case.file for case in cases}) == len({case.name for case in cases}) == 5
    for case in cases:
        assert json.loads(json.dumps(case.file).encode()) == case.file
        assert case.path.is_file()
    assert printable_path(Path(os.fsdecode(b"a/\xff.png"))) == r"a/\xff.png"


def test_no_name_ends_a_line_of_the_table(tmp_path: Path) -> None:
    """Python 3.11 writes a carriage return into CSV as it is, and reads it as the line's end."""
    (case,) = find_cases(touch(tmp_path, "a\rb.png"))
    assert (case.name, case.file) == ("a\\rb", "a\\rb.png") and case.path.is_file()


def test_long_names_stay_apart_and_fit_a_folder(tmp_path: Path) -> None:
    long = "a" * 246
    touch(tmp_path, f"{long}.png", f"{long}.jpg", f"{long}a.png", f"{'é' * 123}.png")
    touch(tmp_path, f"{long}/{long}/b.png", f"{long}/{long}/c.png")
    found = names(find_cases(tmp_path))
    assert len(set(found)) == 6
    for name in found:
        assert len(name.encode()) <= LONGEST_NAME + 2
        (tmp_path / "out" / name).mkdir(parents=True)


def test_output_folder_inside_the_input_is_no_input(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "out/a/overlay.png", "out2/b.png")
    assert names(find_cases(tmp_path, tmp_path / "out")) == ["a", "out2__b"]
    assert names(find_cases(tmp_path, tmp_path / "not-yet")) == ["a", "out__a__overlay", "out2__b"]
    with pytest.raises(InputError, match="choose another --output"):
        find_cases(tmp_path, tmp_path / "out" / "..")


def test_links_that_cannot_be_looked_at_hide_no_other_case(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "a/3.png")
    for link in ("a/2.png", "a/folder", "images"):
        (tmp_path / link).symlink_to("x" * 300)
    cases = find_cases(tmp_path)
    assert names(cases) == ["a__1", "a__2", "a__3", "a__folder", "images"]
    with pytest.raises(ImageError, match="File name too long"):
        open_image(cases[1].path)
    (tmp_path / "out").symlink_to("out")  # writing there will fail later
    assert len(find_cases(tmp_path, tmp_path / "out")) == 5


def test_folders_deeper_than_python_calls(tmp_path: Path) -> None:
    folders = [tmp_path]
    for _ in range(1100):
        folders.append(folders[-1] / "a")
        folders[-1].mkdir()
    image = touch(folders[-1], "b.png") / "b.png"
    assert [case.path for case in find_cases(tmp_path)] == [image]
    image.unlink()
    for folder in reversed(folders):  # shutil.rmtree cannot go so deep either
        folder.rmdir()


@pytest.mark.parametrize("made", ["nothing", "file", "empty", "no-image", "only-hidden"])
def test_nothing_to_do(tmp_path: Path, made: str) -> None:
    root = tmp_path / "in"
    if made == "file":
        touch(tmp_path, "in")
    elif made != "nothing":
        root.mkdir()
        touch(
            root, *{"no-image": ["notes.txt", "a/b.zip"], "only-hidden": [".a.png"]}.get(made, [])
        )
    with pytest.raises(InputError, match=r"expected files that end in|pass --input DIR") as caught:
        find_cases(root)
    told = "cannot be read" if made in ("nothing", "file") else "no image below"
    assert told in str(caught.value) and str(root) in str(caught.value)


def deny(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make a folder unreadable; permissions would not stop root, who may run the tests."""
    real = Path.iterdir

    def iterdir(self: Path):
        if self == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)


def test_folder_that_cannot_be_listed_is_a_case_that_fails(tmp_path: Path, monkeypatch) -> None:
    touch(tmp_path, "a.png", "lost+found/x.png", "z.png")
    deny(monkeypatch, tmp_path / "lost+found")
    cases = find_cases(tmp_path)
    assert names(cases) == ["a", "lost+found", "z"]
    with pytest.raises(ImageError, match="Permission denied"):
        open_image(cases[1].path)


def test_input_that_cannot_be_listed(tmp_path: Path, monkeypatch) -> None:
    deny(monkeypatch, touch(tmp_path, "a.png"))
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
        find_cases(tmp_path)


def test_jobs_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch) -> None:
    touch(write_job(tmp_path), "images/us/a.mha")
    deny(monkeypatch, tmp_path / "images/us")
    with pytest.raises(ImageError, match="Permission denied"):
        open_image(find_cases(tmp_path)[0].path)
