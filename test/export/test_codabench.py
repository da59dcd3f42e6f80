"""The Codabench bundle: it runs alone, answers as process.py does, and is written whole or not."""

import ast
import io
import json
import os
import subprocess
import sys
import tokenize
import zipfile
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from export import codabench
from export.codabench_bundle import opencv
from model.network import TransUNetConfig, UNetConfig, build_network
from test.conftest import ROOT
from test.model.test_network import SMALL
from test.phantom import phantom
from test.support.runs import png, run
from training.learning.checkpoint import Checkpoint, load_weights, save_weights
from training.recipes import COMPACT

SHIPPED = ROOT / "model" / "weights" / "aop.safetensors"
SIZES = [(256, 256), (512, 512), (640, 480), (190, 141), (301, 517)]

# Does what Codabench's ingestion program does; prints the answers and the imported modules.
INGESTION = """
import json, sys
sys.path.insert(0, sys.argv[1])
from model import model
from PIL import Image
network = model()
assert network.load() is network
answers = [network.predict(Image.open(name).convert("RGB")) for name in sys.argv[2:]]
assert all(answer.shape == (6,) for answer in answers)
files = [str(getattr(module, "__file__", "")) for module in sys.modules.values()]
unwanted = {"cv2", "pydantic", "safetensors", "onnxruntime", "SimpleITK"} & set(sys.modules)
print(json.dumps([[answer.tolist() for answer in answers], files, sorted(unwanted)]))
"""
BY_PATH = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
import numpy as np
from PIL import Image
spec = spec_from_file_location("submission", sys.argv[1] + "/model.py")
module = module_from_spec(spec)
spec.loader.exec_module(module)
network = module.model()
try:
    network.predict(Image.new("RGB", (64, 64)))
except RuntimeError as error:
    assert "call load()" in str(error)
else:
    raise AssertionError
image = Image.fromarray(np.load(sys.argv[2]))
answer = network.load().predict(image)  # the folder it runs in has no weights
network.save("copy/of/it")
again = module.model().load("copy/of/it")
assert again.folder.name == "it" and np.array_equal(again.predict(image), answer)
for odd in (Image.new("RGB", (1, 1)), Image.new("RGB", (300, 7), "red"), image.resize((2000, 33))):
    assert np.isfinite(network.predict(odd)).all()
"""


@pytest.fixture(scope="module")
def submission(tmp_path_factory):
    """The shipped weights as a bundle."""
    output = tmp_path_factory.mktemp("shipped") / "submission.zip"
    assert codabench.main(["--weights", str(SHIPPED), "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small network with random weights, as fit writes it."""
    torch.manual_seed(0)
    network = build_network(SMALL, masks=2)
    recipe = COMPACT.model_copy(update={"network": SMALL, "sigma_cells": 1.5})
    path = tmp_path_factory.mktemp("weights") / "best.safetensors"
    checkpoint = Checkpoint(network=SMALL, masks=2, spec=recipe.spec(2))
    save_weights(path, network.state_dict(), checkpoint)
    return path


def unpack(bundle, folder):
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(folder)
    return folder


def run_alone(code, folder, *arguments):
    """Run code in a process whose folder and search path do not lead to this repository."""
    kept = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=kept, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def largest_difference(submission, images, folder):
    """Between the bundle's landmarks and process.py's for all images in a folder, px."""
    bundle = unpack(submission, folder / "bundle")
    files = sorted(images.iterdir())
    answers, modules, packages = json.loads(run_alone(INGESTION, bundle, bundle, *files))
    ours = [ROOT / name for name in ("model", "training", "export", "test", "process.py")]
    assert not [name for name in modules if any(Path(name).is_relative_to(own) for own in ours)]
    assert str(bundle / "aop" / "masks.py") in modules and packages == []
    model = ["--model", str(ROOT / "model" / "weights" / "aop.onnx")]  # not the int8 one
    done = run(images, folder / "out", "--no-overlay", "--provider", "cpu", *model)
    expected = [list(done.entry(file.name)["landmarks_px"].values()) for file in files]
    return np.linalg.norm(np.reshape(answers, (-1, 3, 2)) - expected, axis=-1).max()


@pytest.mark.slow
def test_bundle_answers_as_process_does_on_phantoms(submission, tmp_path):
    images = tmp_path / "images"
    for k, (width, height) in enumerate(SIZES):
        png(images / f"{k}.png", phantom(k, width, height).image)
    tinted = phantom(7, 320, 280).image[..., None] * np.array([0.8, 0.9, 1.0])
    png(images / "tinted.png", tinted.astype(np.uint8))
    assert largest_difference(submission, images, tmp_path) < 0.1


@pytest.mark.slow
@pytest.mark.real
def test_bundle_answers_as_process_does_on_real_images(submission, psfhs, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for file in sorted((psfhs / "images").iterdir())[::60]:
        (images / file.name).symlink_to(file)
    assert len(list(images.iterdir())) > 15
    assert largest_difference(submission, images, tmp_path) < 0.1


@pytest.mark.slow
def test_bundle_is_flat_and_says_what_it_is(submission):
    with zipfile.ZipFile(submission) as archive:
        texts = {name: archive.read(name) for name in archive.namelist()}
    files = {"metadata", "model.py", "aop.pt", "aop.json", "LICENSE", "NOTICE", "MODEL_CARD.md"}
    assert {name for name in texts if "/" not in name} == files  # no folder around them
    modules = {name for name in texts if "/" in name}
    assert {"aop/masks.py", "aop/network/vit.py"} < modules
    for name in modules - {"aop/opencv.py"}:
        assert texts[name] == (ROOT / "model" / name.removeprefix("aop/")).read_bytes()
    start, end = texts["metadata"].decode().split(":", 1)
    assert start == "description" and "aop-compact" in json.loads(end) and end.count("\n") == 1
    assert texts["LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert texts["MODEL_CARD.md"] == SHIPPED.with_name("MODEL_CARD.md").read_bytes()
    assert "10.1038/s41597-024-03266-4" in texts["NOTICE"].decode()
    assert str(ROOT).encode() not in b"".join(texts.values())


@pytest.mark.slow
def test_bundle_is_loaded_by_path_saves_and_takes_any_picture(submission, tmp_path):
    bundle = unpack(submission, tmp_path / "bundle")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    image = tmp_path / "image.npy"
    np.save(image, phantom(3).image)
    run_alone(BY_PATH, elsewhere, bundle, image)


@pytest.mark.slow
def test_same_weights_give_the_same_bytes(weights, tmp_path):
    for name in ("one.zip", "two.zip"):
        words = ["--name", "team", "--description", "a: 1\nand # 2"]
        arguments = ["--weights", str(weights), "--output", str(tmp_path / name), *words]
        assert codabench.main(arguments) == 0
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.zip", "two.zip"]
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert archive.read("metadata") == b'description: "team: a: 1 and # 2"\n'
        assert "MODEL_CARD.md" not in archive.namelist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(input_size=64, widths=(4, 6, 8), stride=4),
        TransUNetConfig(input_size=64, vit_width=16, vit_depth=1, vit_heads=2, up_widths=(16, 8)),
    ],
    ids=["unet", "resnet50"],
)
def test_every_kind_of_network_runs_on_its_own(tmp_path, config):
    torch.manual_seed(0)
    network = build_network(config).eval()
    recipe = COMPACT.model_copy(update={"network": config, "mask_share": (0.0,) * 3})
    described = Checkpoint(network=config, masks=0, spec=recipe.spec(0))
    bundle = tmp_path / "a.zip"
    codabench.write_zip(bundle, codabench.bundle_files(network, described, "a", "b", tmp_path))
    assert codabench.compare_with_predictor(bundle, network, described)[0] < 0.01


def refusal(capsys, folder, weights, output):
    """The sentence that export.codabench ends with; nothing is written."""
    before = sorted(folder.rglob("*"))
    assert codabench.main(["--weights", str(weights), "--output", str(output)]) == 2
    assert sorted(folder.rglob("*")) == before
    return capsys.readouterr().err


@pytest.mark.slow
def test_nothing_is_written_where_the_landmarks_differ(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(codabench, "compare_with_predictor", lambda *_: (0.11, 4))
    assert "differ" in refusal(capsys, tmp_path, weights, tmp_path / "a.zip")


@pytest.mark.slow
def test_check_sees_another_networks_weights(weights, tmp_path):
    network, described = load_weights(weights)
    bundle = tmp_path / "a.zip"
    codabench.write_zip(bundle, codabench.bundle_files(network, described, "a", "b", tmp_path))
    torch.manual_seed(1)
    other = build_network(SMALL, masks=2).eval()
    assert codabench.compare_with_predictor(bundle, other, described)[0] > 1


@pytest.mark.slow
@pytest.mark.parametrize("line", ["import pydantic", "import training.fit"])
def test_nothing_is_written_where_the_bundle_needs_more(
    weights, tmp_path, monkeypatch, capsys, line
):
    sources = codabench.bundle_sources()
    sources["aop/masks.py"] = f"{line}\n".encode()
    monkeypatch.setattr(codabench, "bundle_sources", lambda: sources)
    message = refusal(capsys, tmp_path, weights, tmp_path / "a.zip")
    assert "does not run on its own" in message and line.split()[1].split(".")[0] in message


def test_what_is_missing_is_named(weights, tmp_path, capsys):
    assert "no.safetensors" in refusal(
        capsys, tmp_path, tmp_path / "no.safetensors", tmp_path / "a.zip"
    )
    lonely = tmp_path / "lonely.safetensors"
    lonely.write_bytes(weights.read_bytes())
    assert "lonely.json" in refusal(capsys, tmp_path, lonely, tmp_path / "a.zip")
    assert "is a folder" in refusal(capsys, tmp_path, weights, tmp_path)
    assert "there is no folder" in refusal(capsys, tmp_path, weights, tmp_path / "no" / "a.zip")


LATER = {  # names that these modules have only after Python 3.9
    "itertools": {"batched", "pairwise"},
    "typing": {
        "Concatenate", "Never", "NotRequired", "ParamSpec", "Required", "Self", "TypeAlias",
        "TypeGuard", "Unpack", "assert_never", "assert_type", "override", "reveal_type",
    },
}  # fmt: skip


def node_ids(*trees):
    """The ids of some nodes and of all nodes below them."""
    return {id(part) for tree in trees if tree is not None for part in ast.walk(tree)}


def unions_at_run_time(tree):
    """Lines that evaluate A | B of types: in annotations, aliases and isinstance."""
    nodes = list(ast.walk(tree))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    bodies = node_ids(*(line for function in functions for line in function.body))
    annotations = node_ids(
        *(getattr(node, name, None) for node in nodes for name in ("annotation", "returns"))
    )
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    of_types = node_ids(*(c for c in calls if getattr(c.func, "id", "") in ("isinstance", "cast")))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    if imports and imports[0].module == "__future__":
        evaluated = of_types | (node_ids(tree) - bodies - annotations)
    else:
        evaluated = of_types | annotations | (node_ids(tree) - bodies)
    return [
        f"line {node.lineno}: | of types"
        for node in nodes
        if isinstance(getattr(node, "op", None), ast.BitOr) and id(node) in evaluated
    ]


def too_new_for_python_39(text):
    """A line for each thing in a source that Python 3.9 cannot run."""
    try:
        tree = ast.parse(text, feature_version=(3, 9))
    except SyntaxError as error:
        return [f"line {error.lineno}: {error.msg}"]
    found = unions_at_run_time(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            words = {word.arg for word in node.keywords}
            name = getattr(node.func, "id", "")
            if words & {"zip": {"strict"}, "dataclass": {"slots", "kw_only"}}.get(name, set()):
                found.append(f"line {node.lineno}: {name}({', '.join(words)})")
        elif isinstance(node, ast.ImportFrom):
            new = {alias.name for alias in node.names} & LATER.get(node.module, set())
            found += [f"line {node.lineno}: {name}" for name in new]
        elif isinstance(node, ast.Attribute) and node.attr in LATER["itertools"]:
            found.append(f"line {node.lineno}: {node.attr}")
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    for token, after in pairwise(tokens):
        if (token.type, token.string, after.string) == (tokenize.NAME, "with", "("):
            found.append(f"line {token.start[0]}: with (")
    return found


@pytest.mark.parametrize("name", sorted(codabench.bundle_sources()))
def test_sources_run_in_python_39_and_import_nothing_else(name):
    sources = codabench.bundle_sources()
    text = sources[name].decode()
    assert too_new_for_python_39(text) == []
    allowed = sys.stdlib_module_names | {"numpy", "torch", "PIL"}
    allowed |= {"cv2"} if name in ("aop/frame.py", "aop/masks.py") else set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            path = node.module.replace("model", "aop", 1).replace(".", "/")
            ours = {f"{path}.py", f"{path}/__init__.py"} & set(sources)
            assert ours or node.module.split(".")[0] in allowed
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "cv2":
            assert hasattr(opencv, node.attr)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("match 1:\n    case 1: pass", "match"),
        ("zip([], [], strict=True)", "zip(strict)"),
        ("A = int | str", "|"),
        ("isinstance(1, int | str)", "|"),
        ("with (open('a') as a, open('b') as b): pass", "with ("),
        ("from itertools import pairwise", "pairwise"),
        ("from typing import Self", "Self"),
        ("from dataclasses import dataclass\n@dataclass(slots=True)\nclass A: pass", "dataclass"),
        ("try: pass\nexcept* OSError: pass", "xception groups"),
    ],
)
def test_what_python_39_cannot_run_is_seen(line, word):
    head = '"""Words."""\n\nfrom __future__ import annotations\n\n'
    assert too_new_for_python_39(f"{head}def f(a: int | str) -> int | None: ...\n") == []
    (found,) = too_new_for_python_39(f"{head}{line}\n")
    assert word.lower() in found.lower()
    (found,) = too_new_for_python_39('"""Words."""\n\ndef f(a: int | str): ...\n')
    assert "|" in found


@pytest.mark.parametrize(
    ("old", "new", "interpolation"),
    [
        ((190, 141), (256, 190), cv2.INTER_LINEAR), ((256, 200), (512, 400), cv2.INTER_LINEAR),
        ((40, 60), (40, 60), cv2.INTER_LINEAR), ((512, 512), (256, 256), cv2.INTER_AREA),
        ((640, 480), (256, 192), cv2.INTER_AREA), ((301, 517), (149, 256), cv2.INTER_AREA),
    ],
)  # fmt: skip
def test_pictures_are_resized_as_by_opencv(old, new, interpolation):
    image = np.random.default_rng(old).integers(0, 256, old[::-1], np.uint8)
    found = opencv.resize(image, new, interpolation).astype(int)
    apart = np.abs(found - cv2.resize(image, new, interpolation=interpolation))
    assert apart.max() == 0


def test_shares_are_enlarged_as_by_opencv():
    shares = np.random.default_rng(0).random((16, 24), np.float32)
    expected = cv2.resize(shares, (96, 64), interpolation=cv2.INTER_CUBIC)
    found = opencv.resize(shares, (96, 64), opencv.INTER_CUBIC)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_outlines_are_those_of_opencv(seed):
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.standard_normal((70, 90)), (0, 0), 0.6 + seed)
    mask = (noise > 0).astype(np.uint8)
    count, labels, stats, _ = opencv.connectedComponentsWithStats(mask)
    expected_count, expected, expected_stats, _ = cv2.connectedComponentsWithStats(mask)
    assert count == expected_count
    assert len(np.unique(labels * count + expected)) == count  # the same but for the numbers
    area = opencv.CC_STAT_AREA
    assert sorted(stats[:, area]) == sorted(expected_stats[:, cv2.CC_STAT_AREA])
    for label in range(1, min(count, 12)):
        component = (labels == label).astype(np.uint8)
        arguments = (component, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        (found,), _ = opencv.findContours(*arguments)
        np.testing.assert_array_equal(found, cv2.findContours(*arguments)[0][0])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("label", [1, 2])
def test_ellipses_are_those_of_opencv(seed, label):
    mask = (phantom(seed).mask == label).astype(np.uint8)
    contour = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0][0]
    centre, diameters, angle = opencv.fitEllipse(contour)
    expected_centre, expected_diameters, expected_angle = cv2.fitEllipse(contour)
    np.testing.assert_allclose(centre, expected_centre, atol=1e-3)
    np.testing.assert_allclose(sorted(diameters), expected_diameters, atol=1e-3)
    turned = angle + (90 if diameters[0] > diameters[1] else 0) - expected_angle
    assert abs((turned + 90) % 180 - 90) < 0.01
