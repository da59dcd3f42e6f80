"""Case tables, landmarks from masks, groups and splits, phantoms, and the prepare command."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from model.anatomy import angle_of_progression
from model.masks import Ellipse, MaskError, fit_ellipse, landmarks_from_mask, outer_contour
from test.phantom import main as phantom_main
from test.phantom import phantom
from training import prepare
from training.data.case_table import (
    SPLITS,
    Case,
    CaseError,
    cases_of_split,
    find_case_tables,
    read_cases,
    read_table,
    require_images,
    write_cases,
)
from training.data.near_duplicates import (
    BLOCK_ROWS,
    near_duplicate_groups,
    split_by_group,
    thumbnail,
)
from training.data.sources import read_mask
from training.evaluation.pictures import SHEET_TILE

SPLITS_OF_PSFHS = Path(prepare.__file__).with_name("psfhs_splits.csv")

POINTS = np.array([[130.25, 40.5], [60.0, 61.12347], [190.0, 110.0]])


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def ellipse_mask(*parts: tuple[int, tuple[int, int], tuple[int, int], float]) -> np.ndarray:
    """(150, 200) mask of filled ellipses: label, centre, semi-axes, degrees."""
    mask = np.zeros((150, 200), np.uint8)
    for label, centre, axes, angle in parts:
        cv2.ellipse(mask, centre, axes, angle, 0, 360, label, -1)
    return mask


SYMPHYSIS, HEAD = (1, (60, 30), (20, 9), 160.0), (2, (90, 95), (45, 35), 80.0)

# ---- landmarks from masks


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(256, 256), (512, 512), (320, 200), (200, 300)])
def test_landmarks_of_phantom_masks(width: int, height: int) -> None:
    for seed in range(12):
        made = phantom(seed, width, height)
        assert made.image.shape == made.mask.shape == (height, width)
        found = landmarks_from_mask(made.mask)
        assert np.linalg.norm(found - made.landmarks_px, axis=1).max() < 1.0
        assert abs(angle_of_progression(found) - made.aop_deg) < 1.0


@pytest.mark.real
def test_landmarks_of_real_masks(psfhs: Path) -> None:
    cases = read_cases(psfhs / "cases.csv")
    errors = [
        np.abs(landmarks_from_mask(read_mask(psfhs / "masks" / c.file)) - c.landmarks_px).max()
        for c in cases
    ]
    assert len(errors) > 1000
    assert np.mean(np.array(errors) <= 0.5) >= 0.99


@pytest.mark.real
def test_published_masks_equal_png_masks(psfhs: Path) -> None:
    published = sorted((psfhs / "original_format" / "label_mha").glob("*.mha"))
    assert published
    for path in published:
        np.testing.assert_array_equal(
            read_mask(path), read_mask(psfhs / "masks" / f"{path.stem}.png")
        )


def test_only_the_largest_component_counts() -> None:
    clean = ellipse_mask(SYMPHYSIS, HEAD)
    speckled = ellipse_mask(SYMPHYSIS, HEAD, (1, (180, 10), (6, 6), 0.0), (2, (10, 140), (7, 7), 0))
    np.testing.assert_array_equal(landmarks_from_mask(speckled), landmarks_from_mask(clean))


def test_a_component_within_a_thin_ring_may_be_the_largest() -> None:
    mask = np.zeros((60, 60), np.uint8)
    cv2.circle(mask, (30, 30), 25, 2)
    ring = mask.copy()
    cv2.circle(mask, (30, 30), 15, 2, -1)
    assert np.ptp(outer_contour(mask, 2), axis=0).tolist() == [[30, 30]]
    assert np.ptp(outer_contour(ring, 2), axis=0).tolist() == [[50, 50]]


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0, 135.0, 179.0])
def test_the_longer_axis_comes_first(angle: float) -> None:
    ellipse = fit_ellipse(ellipse_mask((1, (100, 75), (40, 15), angle)), 1)
    way = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
    assert abs(ellipse.direction @ way) > 0.999
    np.testing.assert_allclose(ellipse.semi_axes, [40, 15], atol=1)
    assert ellipse.ends()[0, 0] >= ellipse.ends()[1, 0]


def test_tangent_points_of_a_circle() -> None:
    """From a distance of two radii the tangents touch at 60 deg from the line to the centre."""
    circle = Ellipse(np.array([10.0, 20.0]), np.array([3.0, 3.0]), np.array([1.0, 0.0]))
    touching = circle.tangent_points(np.array([16.0, 20.0]))
    assert touching is not None
    half, root = 1.5, 1.5 * np.sqrt(3)
    np.testing.assert_allclose(touching, [[10 + half, 20 - root], [10 + half, 20 + root]])
    assert circle.tangent_points(np.array([11.0, 20.0])) is None


LINE = ellipse_mask(HEAD)
LINE[10, 20:60] = 1
DOT = ellipse_mask(HEAD)
DOT[10:12, 20:22] = 1
CUT = ellipse_mask((1, (60, 30), (20, 9), 160.0), (2, (199, 80), (80, 40), 45.0))


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (ellipse_mask(HEAD), r"no pixel of the pubic symphysis \(1\)"),
        (ellipse_mask(SYMPHYSIS), r"no pixel of the fetal head \(2\)"),
        (DOT, r"has 4 points; an ellipse needs 5"),
        (LINE, r"no ellipse fits the contour of the pubic symphysis"),
        (ellipse_mask(HEAD, (1, (90, 95), (20, 9), 0.0)), r"PS1 lies inside the fetal head"),
        (ellipse_mask((1, (2, 30), (20, 9), 0.0), HEAD)[:, ::-1], r"PS1 would lie outside"),
        (
            ellipse_mask(SYMPHYSIS, HEAD) * 100,
            r"values \[100, 200\]; expected only 0 \(background\)",
        ),
        (np.zeros((1, 150, 200), np.uint8), r"expected a mask of \(height, width\)"),
    ],
)
def test_mask_errors(mask: np.ndarray, reason: str) -> None:
    with pytest.raises(MaskError, match=reason):
        landmarks_from_mask(mask)


def test_mask_files(tmp_path: Path) -> None:
    import SimpleITK

    mask = ellipse_mask(SYMPHYSIS, HEAD)
    cv2.imwrite(str(tmp_path / "m.png"), mask)
    for name, array in (("plane.mha", mask), ("slice.mha", mask[None])):
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(tmp_path / name))
        np.testing.assert_array_equal(read_mask(tmp_path / name), mask)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), mask)

    whole = (tmp_path / "plane.mha").read_bytes()
    (tmp_path / "cut.mha").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    cv2.imwrite(str(tmp_path / "colour.png"), np.dstack([mask] * 3))
    for name, reason in {
        "cut.mha": "damaged or not a MetaImage",
        "text.png": "damaged or not a PNG",
        "colour.png": "expected uint8 of",
        "none.png": "does not exist",
        "m.jpg": "read from .png or .mha",
    }.items():
        with pytest.raises(MaskError, match=reason):
            read_mask(tmp_path / name)


# ---- case tables


def test_cases_round_trip(tmp_path: Path) -> None:
    cases = [
        Case("a/1.png", POINTS, 101.23456, "train", "A", "g1"),
        Case("b.png", POINTS.astype(np.float32), np.float64(99.0)),
        Case("b.png", POINTS, 99.0, frame=7),
    ]
    write_cases(tmp_path / "cases.csv", cases)
    assert lines(tmp_path / "cases.csv")[:2] == [
        "Filename,PS1,PS2,FH1,AoP,split,device,group,Frame",
        'a/1.png,"(130.25, 40.5)","(60.0, 61.1235)","(190.0, 110.0)",101.2346,train,A,g1,',
    ]
    back = read_cases(tmp_path / "cases.csv")
    for got, wanted in zip(back, cases, strict=True):
        np.testing.assert_allclose(got.landmarks_px, wanted.landmarks_px, atol=5e-5)
        assert got.landmarks_px.dtype == np.float64
        assert got.aop_deg == pytest.approx(wanted.aop_deg, abs=5e-5)
        assert got.file == wanted.file
        assert (got.split, got.device, got.group) == (wanted.split, wanted.device, wanted.group)
        assert got.frame == wanted.frame
    write_cases(tmp_path / "cases.csv", [Case("c.png", POINTS, 90.0)])
    assert lines(tmp_path / "cases.csv")[0] == "Filename,PS1,PS2,FH1,AoP"
    assert [path.name for path in tmp_path.iterdir()] == ["cases.csv"]


def test_iugc_training_table(tmp_path: Path) -> None:
    """The angle is the table's own; where the column is missing it is computed."""
    rows = '1.jpg,"(300, 80)","(200,100)","[350, 200]"'
    (tmp_path / "t.csv").write_text(f"\ufeffFilename,PS1,PS2,FH1,AoP\n{rows},104.5\n", "utf-8")
    (tmp_path / "u.csv").write_text(f"filename,ps1,ps2,fh1\n{rows}\n", "utf-8")
    given, computed = read_cases(tmp_path / "t.csv"), read_cases(tmp_path / "u.csv")
    assert given[0].aop_deg == 104.5
    np.testing.assert_array_equal(given[0].landmarks_px, [[300, 80], [200, 100], [350, 200]])
    # the way to PS2 lies 168.69 deg from x, that to FH1 67.38 deg
    assert computed[0].aop_deg == pytest.approx(101.3099, abs=1e-4)


@pytest.mark.parametrize(
    "header", ["Filename,AoP", "image_name,AOP (deg)", "File,Angle,AOP Tangency"]
)
def test_iugc_validation_folder(tmp_path: Path, header: str) -> None:
    (tmp_path / "landmarks_data.csv").write_text(
        "Filename,PS1,PS2,AOP Tangency\n"
        '1.jpg,"(300, 80)","(200, 100)","(350, 200)"\n'
        '2.jpg,"(310, 80)","(200, 100)","(350, 201)"\n'
    )
    (tmp_path / "AoP_results.csv").write_text(f"{header}\n2.jpg,99.5,\n1.jpg,101.5,\n")
    assert find_case_tables(tmp_path) == [tmp_path / "landmarks_data.csv"]
    cases = read_cases(tmp_path)
    assert [(case.file, case.aop_deg) for case in cases] == [("1.jpg", 101.5), ("2.jpg", 99.5)]
    np.testing.assert_array_equal(cases[1].landmarks_px, [[310, 80], [200, 100], [350, 201]])


GOOD = '1.png,"(3, 8)","(2, 1)","(3, 20)",90'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected a header line"),
        (
            f"Filename,PS1,PS2,AoP\n{GOOD}",
            "expected one column FH1, found none among Filename, PS1, PS2, AoP",
        ),
        (
            f"Filename,PS1,PS2,FH1,AoP\n{GOOD}\n2.png,oops,,,",
            r"line 3, column PS1: expected a point .*'oops'",
        ),
        (
            'Filename,PS1,PS2,FH1,AoP\n1.png,"(3, 8)","(2, 1, 0)","(3, 20)",90',
            r"line 2, column PS2: .*'\(2, 1, 0\)'",
        ),
        (
            'Filename,PS1,PS2,FH1,AoP\n1.png,"(3, 8)","(2, 1)","(1e999, 2)",90',
            r"line 2, column FH1: .*1e999",
        ),
        (
            f"Filename,PS1,PS2,FH1,AoP\n{GOOD}0",
            "line 2, column AoP: expected degrees from 0 to 180, got '900'",
        ),
        (f"Filename,PS1,PS2,FH1,AoP\n{GOOD}\n{GOOD}", "line 3, column Filename: '1.png' .* twice"),
        (f"Filename,PS1,PS2,FH1,AoP,Frame\n{GOOD},x", "line 2, column Frame: .*'x'"),
        ('Filename,PS1,PS2,FH1\n1.png,"(3, 8)","(3, 8)","(3, 20)"', "line 2: PS2 or FH1 equals"),
        (f"Filename,PS1,PS2,FH1,AoP\n{GOOD[5:]}", "line 2, column Filename: expected the name"),
        ("Filename|PS1|PS2|FH1\n", "expected commas between the columns, found bars$"),
        (
            "\nFilename;PS1,PS2\tFH1",
            "line 2: expected commas, semicolons or tabs .*, found as many commas as semicolons as "
            "tabs; put names",
        ),
        ("Filename;PS1;PS2;FH1\n1.png;(3,5, 8,0);(2, 1);(3, 20)", r"line 2, column PS1: .*'\(3,5"),
        ("Filename;PS1;PS2;FH1\n1.png;(3,5 8);(2, 1);(3, 20)", r"line 2, column PS1: .*'\(3,5 8\)"),
        (
            "sep=;\nFilename;PS1;PS2;FH1\n1.png;(3,5; 8,0);(2, 1);(3, 20)",
            r'line 3: the row has more cells .* decimal commas "\(x; y\)"$',
        ),
        (
            'Filename,PS1,PS2,FH1\n1.png,"(3,5; 8)","(2, 1)","(3, 20)"',
            r"line 2, column PS1: .*'\(3,5; 8\)'$",
        ),
        (
            f'Filename,PS1,PS2,FH1,AoP\n{GOOD[:-2]}"90,5"',
            "line 2, column AoP: expected degrees from 0 to 180, got '90,5'$",
        ),
        (
            "Filename;PS1;PS2;FH1;AoP\n\n;;;;\n1.png;(3, 8);(2, 1);(3, 20);1.234,5",
            "line 4, column AoP: .*'1.234,5'$",
        ),
        (
            "Filename,PS1,PS2,FH1\n1.png;(3, 8);(2, 1);(3, 20)",
            "line 2, column PS1: expected a point",
        ),
        (
            "Filename,PS1,PS2,FH1\n1.png,(3, 8),(2, 1),(3, 20)",
            'line 2: the row has more cells than the header; .* in quotes .*"\\(x, y\\)"$',
        ),
        (
            'Filename,PS1,PS2,FH1\n1.png,"(3,5, 8,0)","(2, 1)","(3, 20)"',
            r"line 2, column PS1: .* such as \"\(131.5, 82\)\", got '\(3,5, 8,0\)'$",
        ),
        (
            f"Filename,PS1,PS2,FH1,AoP\n{GOOD}\n2.png,,,,",
            "line 3, column PS1: .*got an empty cell$",
        ),
        (
            f"Filename,PS1,PS2,FH1,AoP,split\n{GOOD},Train",
            "line 2, column split: expected train, val, test or an empty cell, got 'Train'$",
        ),
        (
            f"Filename,PS1,PS2,FH1,AoP\n{GOOD.replace('(3, 8)', 'x' * 99)}",
            "column PS1: .*got 'x{57}[.]{3}'$",
        ),
        (f"Filename,PS1,PS1,PS2,FH1,AoP\n{GOOD}", "one column PS1, found PS1, PS1 among Filename"),
    ],
)
def test_case_table_errors(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "cases.csv"
    path.write_text(text)
    with pytest.raises(CaseError, match=f"cases.csv.*{reason}"):
        read_cases(path)


def test_what_is_no_table_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match=r"none.csv: the table cannot be read: No such file"):
        read_cases(tmp_path / "none.csv")
    (tmp_path / "book.csv").write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(CaseError, match=r"book.csv: expected a CSV file in UTF-8; .* 'CSV UTF-8'$"):
        read_cases(tmp_path / "book.csv")
    (tmp_path / "book.csv").write_bytes("Filename,PS1".encode("utf-16-le"))
    with pytest.raises(CaseError, match=r"book.csv: expected a CSV file in UTF-8"):
        read_cases(tmp_path / "book.csv")


EXCEL = """Filename;PS1;PS2;FH1;AoP;device;
images\\a.png;"(3,5; 8)";(2, 1);"( 3.25;20,75 )";90,5;Gerät;
;;;;;;
images\\b.png;(3, 8);(2, 1);(3, 20);90;;
;;;;;;

"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("form", ["semicolons", "tabs", "named", "quoted name", "blank first"])
def test_tables_that_excel_writes(tmp_path: Path, encoding: str, ending: str, form: str) -> None:
    before = {"named": "sep=;\n", "quoted name": '"SEP=;"\n', "blank first": ";;;;;;\n\n"}
    text = before.get(form, "") + EXCEL
    if form == "tabs":
        text = re.sub(r";(?! 8|20)", "\t", text)
    (tmp_path / "t.csv").write_bytes(text.replace("\n", ending).encode(encoding))
    one, other = read_cases(tmp_path / "t.csv")
    assert (one.file, one.aop_deg, one.device) == ("images/a.png", 90.5, "Gerät")
    assert (other.file, other.aop_deg, other.device) == ("images/b.png", 90.0, None)
    assert one.landmarks_px.tolist() == [[3.5, 8], [2, 1], [3.25, 20.75]]
    assert other.landmarks_px.tolist() == [[3, 8], [2, 1], [3, 20]]
    first = text[: text.index("Filename")].count("\n") + 2
    assert [line for line, _ in read_table(tmp_path / "t.csv").rows] == [first, first + 2]


def test_backslashes_stay_in_a_table_with_slashes(tmp_path: Path) -> None:
    points = '"(3, 8)","(2, 1)","(3, 20)"'
    rows = [rf"a/\xff.png,{points}", rf"b\c.png,{points}"]
    (tmp_path / "t.csv").write_text("\n".join(["Filename,PS1,PS2,FH1", *rows]))
    assert [case.file for case in read_cases(tmp_path / "t.csv")] == [r"a/\xff.png", r"b\c.png"]
    (tmp_path / "t.csv").write_text("\n".join(["Filename,PS1,PS2,FH1", *rows[1:]]))
    assert [case.file for case in read_cases(tmp_path / "t.csv")] == ["b/c.png"]


def test_names_may_hold_separators_in_quotes(tmp_path: Path) -> None:
    text = 'Filename,PS1,PS2,FH1,"notes; of; all; of us"\n1.png,"(3; 8.5)","(2, 1)","(3, 20)",x\n'
    (tmp_path / "t.csv").write_text(text)
    assert read_cases(tmp_path / "t.csv")[0].landmarks_px[0].tolist() == [3, 8.5]


def test_a_space_after_a_comma_does_no_harm(tmp_path: Path) -> None:
    text = 'Filename, PS1, PS2, FH1, AoP\n1.png, "(3, 8)", "(2, 1)", "(3, 20)", 90\n'
    (tmp_path / "cases.csv").write_text(text)
    (case,) = read_cases(tmp_path / "cases.csv")
    assert case.file == "1.png" and case.landmarks_px.tolist() == [[3, 8], [2, 1], [3, 20]]


def test_the_images_of_a_table_must_be_there(tmp_path: Path) -> None:
    table, images = tmp_path / "cases.csv", tmp_path / "images"
    cases = [Case("a.png", POINTS, 90.0), Case("b", POINTS, 90.0), Case("c.png", POINTS, 90.0)]
    with pytest.raises(
        CaseError, match="images is not a folder; expected the folder of the images"
    ):
        require_images(cases, images, table)
    images.mkdir()
    for name in ("a.png", "b.png"):
        (images / name).touch()
    with pytest.raises(
        CaseError, match=r"2 of the 3 images of .*cases.csv .*, which has b.png; .* is b \("
    ):
        require_images(cases, images, table)
    require_images(cases[:1], images, table)
    with pytest.raises(
        CaseError, match=r"1 of the 1 images .* are not in \S+images; .* is c.png .*suffix"
    ):
        require_images(cases[2:], images, table)


def test_cases_are_counted_by_split(tmp_path: Path) -> None:
    splits = ["val", "train", None, "train", "val", "train"]
    cases = [Case(f"{k}.png", POINTS, 90.0, split) for k, split in enumerate(splits)]
    write_cases(tmp_path / "cases.csv", cases)
    assert len(cases_of_split(tmp_path / "cases.csv", None)) == 6
    assert [c.file for c in cases_of_split(tmp_path / "cases.csv", "val")] == ["0.png", "4.png"]
    wanted = "expected cases of split 'test', the table has 3 of train, 2 of val and 1 of no split"
    with pytest.raises(CaseError, match=f"cases.csv: {wanted}$"):
        cases_of_split(tmp_path / "cases.csv", "test")
    write_cases(tmp_path / "cases.csv", [])
    with pytest.raises(CaseError, match=r"expected cases, the table has no rows$"):
        cases_of_split(tmp_path / "cases.csv", None)


# ---- groups and splits


def test_near_duplicates_form_chains() -> None:
    """a resembles b and b resembles c, so that a and c share a group though they do not."""
    rng = np.random.default_rng(0)
    a, far, other = rng.normal(128, 30, (3, 32, 32))
    b, c = 0.8 * a + 0.4 * far, 0.5 * a + 0.8 * far
    flat = [np.clip(image, 0, 255).ravel() for image in (a, b, c)]
    correlation = np.corrcoef(flat)
    assert correlation[0, 1] > 0.8
    assert correlation[1, 2] > 0.8
    assert correlation[0, 2] < 0.7
    assert near_duplicate_groups([a, other, c, b], 0.8) == [0, 1, 0, 0]
    assert near_duplicate_groups([a, other, c, b], 0.99) == [0, 1, 2, 3]


def test_groups_join_across_blocks_and_leave_constant_images_alone() -> None:
    rng = np.random.default_rng(1)
    images = list(rng.integers(0, 256, (BLOCK_ROWS + 40, 32, 32), np.uint8))
    images[BLOCK_ROWS + 5] = images[3]
    images[7] = images[8] = np.full((32, 32), 9, np.uint8)
    groups = near_duplicate_groups(images)
    assert groups[BLOCK_ROWS + 5] == groups[3]
    assert len(set(groups)) == len(images) - 1
    assert near_duplicate_groups([]) == []


def test_thumbnails_make_the_size_of_an_image_irrelevant() -> None:
    small, large = phantom(3, 256, 256).image, phantom(3, 512, 512).image
    assert near_duplicate_groups([small, phantom(4).image, large]) == [0, 1, 0]
    np.testing.assert_array_equal(thumbnail(thumbnail(small)), thumbnail(small))


@pytest.mark.real
def test_groups_of_real_images(psfhs: Path) -> None:
    cases = read_cases(psfhs / "cases.csv")
    groups = near_duplicate_groups(cv2.imread(str(psfhs / "images" / c.file), 0) for c in cases)
    known = [case.group for case in cases]
    assert len(set(zip(groups, known, strict=True))) == len(set(groups)) == len(set(known))


def test_splits_keep_groups_whole() -> None:
    sizes = np.random.default_rng(2).integers(1, 12, 150)
    groups = [f"p{k}" for k, size in enumerate(sizes) for _ in range(size)]
    splits = split_by_group(groups, (0.7, 0.1, 0.2), seed=5)
    assert len({*zip(groups, splits, strict=True)}) == 150
    for name, share in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
        assert splits.count(name) / len(groups) == pytest.approx(share, abs=0.02)
    assert splits == split_by_group(groups, (0.7, 0.1, 0.2), seed=5)
    assert splits != split_by_group(groups, (0.7, 0.1, 0.2), seed=6)
    assert set(split_by_group(groups, (0.8, 0.2, 0), seed=5)) == {"train", "val"}


@pytest.mark.parametrize("shares", [(0.7, 0.2), (0.7, 0.2, 0.2), (1.2, -0.2, 0.0)])
def test_shares_that_are_none(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="three numbers from 0 that add up to 1"):
        split_by_group([1, 2], shares)


# ---- phantoms and the command


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    assert phantom_main(["--output", str(folder), "--count", "6", "--seed", "40"]) == 0
    return folder


def test_phantoms_are_reproducible_and_carry_the_signs_of_ultrasound(phantoms: Path) -> None:
    one, again = phantom(41), phantom(41)
    np.testing.assert_array_equal(one.image, again.image)
    assert (one.image[:60, :20] == 0).all()  # outside of the sector
    assert one.image[one.mask == 1].mean() > 2 * one.image[one.mask == 2].mean()
    (case,) = [c for c in read_cases(phantoms / "cases.csv") if c.file == "phantom-0041.png"]
    np.testing.assert_allclose(case.landmarks_px, one.landmarks_px, atol=1e-4)


def test_prepare_from_masks(phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    masks, output = tmp_path / "masks", tmp_path / "new" / "cases.csv"
    masks.mkdir()
    for path in (phantoms / "masks").iterdir():
        (masks / path.name).write_bytes(path.read_bytes())
    cv2.imwrite(str(masks / "phantom-0042.png"), ellipse_mask(HEAD))  # too small for its image
    (masks / "phantom-0043.png").write_text("broken")
    (masks / "phantom-0044.png").unlink()
    command = ["--images", str(phantoms / "images"), "--masks", str(masks)]
    command += ["--output", str(output), "--split", "0.34", "0.33", "0.33"]
    assert prepare.main(command) == 0

    truth = {case.file: case for case in read_cases(phantoms / "cases.csv")}
    cases = read_cases(output)
    assert [case.file for case in cases] == [f"phantom-00{k}.png" for k in (40, 41, 45)]
    for case in cases:
        assert np.abs(case.landmarks_px - truth[case.file].landmarks_px).max() < 1
        assert case.group
    assert {case.split for case in cases} == set(SPLITS)
    skipped = dict(csv.reader(lines(output.parent / "cases.skipped.csv")[1:]))
    assert list(skipped) == ["phantom-0044.png", "phantom-0042.png", "phantom-0043.png"]
    said = capsys.readouterr().out
    assert all(f"skipped {file}: {reason}\n" in said for file, reason in skipped.items())
    assert "200x150 px, its image 256x256" in skipped["phantom-0042.png"]
    assert "1 images and 0 masks" in skipped["phantom-0044.png"]
    sheet = cv2.imread(str(output.parent / "cases.contact-sheet.png"))
    assert sheet.shape[1] == 3 * SHEET_TILE


def test_prepare_groups_by_patient(phantoms: Path, tmp_path: Path) -> None:
    table, output = tmp_path / "patients.csv", tmp_path / "cases.csv"
    table.write_text(
        "Filename,Patient ID\n" + "".join(f"phantom-00{k}.png,p{k % 2}\n" for k in range(40, 45))
    )
    command = ["--images", str(phantoms / "images"), "--masks", str(phantoms / "masks")]
    command += ["--output", str(output), "--patients", str(table), "--patient-column"]
    assert prepare.main([*command, "patient_id"]) == 0
    assert [case.group for case in read_cases(output)] == ["p0", "p1", "p0", "p1", "p0"]
    assert "phantom-0045.png" in (tmp_path / "cases.skipped.csv").read_text()
    assert prepare.main([*command, "Doctor"]) == 1


def test_prepare_with_the_splits_of_a_table(phantoms: Path, tmp_path: Path) -> None:
    table, output = tmp_path / "splits.csv", tmp_path / "cases.csv"
    names = sorted(path.stem for path in (phantoms / "images").iterdir())
    rows = [f"{name},{'val' if k % 2 else 'test'},B,g{k // 2}" for k, name in enumerate(names[1:])]
    table.write_text("\n".join(["Filename,split,device,group", *rows]))
    command = ["--images", str(phantoms / "images"), "--masks", str(phantoms / "masks")]
    assert prepare.main([*command, "--output", str(output), "--splits", str(table)]) == 0
    told = [f"{Path(c.file).stem},{c.split},{c.device},{c.group}" for c in read_cases(output)]
    assert sorted(told) == rows
    assert names[0] in (tmp_path / "cases.skipped.csv").read_text()
    with pytest.raises(SystemExit):
        prepare.main([*command, "--output", "x", "--splits", str(table), "--split", "1", "0", "0"])


@pytest.mark.real
def test_the_splits_of_psfhs_are_those_of_its_table(psfhs: Path) -> None:
    rows = read_table(SPLITS_OF_PSFHS).rows
    told = {(row["Filename"], row["split"], row["device"], row["group"]) for _, row in rows}
    cases = read_cases(psfhs / "cases.csv")
    assert told == {(Path(c.file).stem, c.split, c.device, c.group) for c in cases}


def test_prepare_from_iugc(phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    release = tmp_path / "release"
    for folder, numbers in (("training", (40, 41)), ("validation_set", (42, 43))):
        (release / folder / "images").mkdir(parents=True)
        for k in numbers:
            name = f"phantom-00{k}.png"
            content = (phantoms / "images" / name).read_bytes()
            (release / folder / "images" / name).write_bytes(content)
    rows = [re.sub(r",[AB]$", "", line) for line in lines(phantoms / "cases.csv")]
    table = [rows[0].removesuffix(",device"), *rows[1:3], rows[6]]
    (release / "training" / "labels.csv").write_text("\n".join(table))
    halves = [row.rsplit(",", 1) for row in rows[3:5]]
    (release / "validation_set" / "landmarks_data.csv").write_text(
        "\n".join(["Filename,PS1,PS2,AOP Tangency", *(points for points, _ in halves)])
    )
    (release / "validation_set" / "aop_results.csv").write_text(
        "Filename,AoP\nphantom-0042.png,77.5\nphantom-0043.png,88.5\n"
    )
    assert prepare.main(["--iugc", str(release), "--output", str(tmp_path / "cases.csv")]) == 0
    cases = read_cases(tmp_path / "cases.csv")
    assert [case.file for case in cases] == [
        "training/images/phantom-0040.png",
        "training/images/phantom-0041.png",
        "validation_set/images/phantom-0042.png",
        "validation_set/images/phantom-0043.png",
    ]
    assert [case.split for case in cases] == ["train", "train", "val", "val"]
    assert [case.aop_deg for case in cases[2:]] == [77.5, 88.5]
    truth = read_cases(phantoms / "cases.csv")
    np.testing.assert_allclose(cases[3].landmarks_px, truth[3].landmarks_px)
    assert "skipped phantom-0045.png: expected one image" in capsys.readouterr().out


def test_prepare_keeps_the_splits_and_groups_of_clicks(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    own = read_cases(phantoms / "cases.csv")
    clicks = tmp_path / "clicks"
    clicks.mkdir()
    for case in own:
        (clicks / case.file).write_bytes((phantoms / "images" / case.file).read_bytes())
    splits = ["train", "train", "val", "test", "train", "val"]
    cases = [
        replace(case, split=split, group=f"p{k // 2}")
        for k, (case, split) in enumerate(zip(own, splits, strict=True))
    ]
    moved = cases[0].landmarks_px + [0.0, 300.0]
    write_cases(clicks / "t.csv", [replace(cases[0], landmarks_px=moved), *cases[1:]])
    command = ["--iugc", str(clicks), "--output", str(tmp_path / "cases.csv")]
    assert prepare.main(command) == 0
    found = [(case.file, case.split, case.group) for case in read_cases(tmp_path / "cases.csv")]
    assert found == [(case.file, case.split, case.group) for case in cases[1:]]
    x, y = moved[0]
    assert f"PS1 of the table, ({x:g}, {y:g}), lies outside the image" in capsys.readouterr().out

    (clicks / "t.csv").write_text("Filename|PS1|PS2|FH1")
    assert prepare.main(command) == 1
    told = capsys.readouterr().err
    assert "no CSV below" in told and "t.csv: expected commas between the columns" in told


def test_prepare_with_nothing_to_derive(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["--output", str(tmp_path / "cases.csv"), "--images", str(phantoms / "images")]
    assert prepare.main([*command, "--masks", str(tmp_path)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("nothing was written: no case could be derived from 6 files; the first")
    assert not (tmp_path / "cases.csv").exists()
    assert len(lines(tmp_path / "cases.skipped.csv")) == 7
    assert prepare.main([*command, "--masks", str(tmp_path / "none")]) == 1
    with pytest.raises(SystemExit):
        prepare.main(command)
