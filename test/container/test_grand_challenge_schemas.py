"""The answers against grand-challenge's own JSON schemas, which lie in schemas/."""

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from test.support.runs import ANGLE, POINTS, THREE, job, load, made, png, run, volume

SCHEMAS = Path(__file__).resolve().parent / "schemas"
FILES = {POINTS: "multiple-points", ANGLE: "float", THREE: "three-point-angle"}


def load_strictly(path: Path) -> object:
    """Read JSON, without the NaN and Infinity that Python would accept."""

    def refuse(text: str) -> object:
        raise ValueError(f"{path.name} holds {text}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def validate(folder: Path, name: str) -> None:
    schema = load(SCHEMAS / f"{FILES[name]}.json")
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.Draft7Validator(schema).validate(load_strictly(folder / name))


@pytest.mark.parametrize("frame", ["world", "pixel"])
def test_answers_validate(tmp_path: Path, frame: str) -> None:
    png(tmp_path / "in" / "a.png")
    noise = np.random.default_rng(0).integers(0, 256, (100, 90), dtype=np.uint8)
    png(tmp_path / "in" / "noise.png", noise)
    volume(tmp_path / "in" / "cine.mha", np.stack([made(1), made(2)]), Spacing=(0.2, 0.3, 1))
    volume(job(tmp_path / "job") / "a.mha", np.stack([made(1), made(2)]), Origin=(-5, 1e5, 3))
    options = ("--three-points-file", THREE, "--frame-of-answers", frame)
    out = run(tmp_path / "in", tmp_path / "out", *options).folder
    of_job = run(tmp_path / "job", tmp_path / "job-out", *options).folder
    for folder in (out / "a", out / "noise", *out.glob("cine/frame-*"), of_job):
        for name in FILES:
            validate(folder, name)


GOOD = {
    "multiple-points": {
        "name": "n",
        "type": "Multiple points",
        "points": [{"name": "PS1", "point": [1, 2, 3], "probability": 0.5}],
        "version": {"major": 1, "minor": 0},
    },
    "three-point-angle": {
        "type": "Three-point angle",
        "angle": [[1, 2, 3]] * 3,
        "version": {"major": 1, "minor": 0},
    },
    "float": 101.5,
}


def bad() -> list[tuple[str, object]]:
    points, angle = GOOD["multiple-points"], GOOD["three-point-angle"]
    (point,) = points["points"]
    return [
        ("multiple-points", {**points, "more": 1}),
        ("multiple-points", {key: value for key, value in points.items() if key != "version"}),
        ("multiple-points", {**points, "type": "Point"}),
        ("multiple-points", {**points, "version": {"major": 1}}),
        *(
            ("multiple-points", {**points, "points": [{**point, **other}]})
            for other in (
                {"point": [1, 2]},
                {"point": [1, 2, "3"]},
                {"probability": 1.01},
                {"probability": -0.01},
                {"x": 1},
            )
        ),
        ("three-point-angle", {**angle, "angle": [[1, 2, 3]] * 2}),
        ("three-point-angle", {**angle, "more": 1}),
        ("float", "101.5"),
    ]


def test_the_schemas_accept_what_is_good() -> None:
    for name, value in GOOD.items():
        jsonschema.Draft7Validator(load(SCHEMAS / f"{name}.json")).validate(value)


@pytest.mark.parametrize(("name", "value"), bad())
def test_the_schemas_refuse_what_is_bad(name: str, value: object) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(load(SCHEMAS / f"{name}.json")).validate(value)
