"""The benchmark: a run from end to end, the command lines that it refuses, and its peers."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import process
from export import benchmark
from export.benchmarks import peers, timing
from model.network import build_network
from model.predictor import load_predictor
from model.spec import METADATA_KEY, ModelSpec
from test.model.test_network import SMALL
from test.phantom import phantom
from training.data.case_table import Case, write_cases
from training.learning.checkpoint import Checkpoint, save_weights
from training.recipes import COMPACT, PAPER, RECIPES

pytestmark = pytest.mark.slow  # they export and time networks

RECIPE = COMPACT.model_copy(update={"network": SMALL, "sigma_cells": 1.5})
STRIDE_8 = replace(SMALL, up_widths=(10, 8), vit_depth=1)


def published():
    spec = RECIPE.model_copy(update={"network": STRIDE_8}).spec()
    return peers.PublishedUpPath(STRIDE_8), spec


TINY = {"published": published}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a training (run/), labelled images and later the peers' cache."""
    root = tmp_path_factory.mktemp("benchmark")
    torch.manual_seed(0)
    (root / "run").mkdir()
    state = build_network(SMALL, masks=2).state_dict()
    described = Checkpoint(network=SMALL, masks=2, spec=RECIPE.spec(2))
    save_weights(root / "run" / "best.safetensors", state, described)
    (root / "images").mkdir()
    cases = []
    for seed in range(6):
        made = phantom(seed, 96, 80)
        cv2.imwrite(str(root / "images" / f"{seed}.png"), made.image)
        split = "val" if seed < 4 else "test"
        cases.append(Case(f"{seed}.png", made.landmarks_px, made.aop_deg, split))
    write_cases(root / "cases.csv", cases)
    return root


def run(place: Path, *options: str) -> int:
    model = ["--model", f"tiny={place / 'run'}", "--cache", str(place / "cache"), "--rounds", "2"]
    return benchmark.main([*model, "--provider", "cpu", "--threads", "1", *options], TINY)


@pytest.fixture(scope="module")
def tiny(place) -> Path:
    """The trained model's ONNX file, as the benchmark exports it."""
    (place / "cache").mkdir(exist_ok=True)
    return peers.trained_model("tiny", place / "run", place / "cache").file


def test_a_run_from_end_to_end(place, tmp_path, capsys):
    labelled = ["--data", str(place / "cases.csv"), "--split", "val", "--output", str(tmp_path)]
    gates = ["--budget-ms", "60000", "--least-ratio", "published=0", "--most-aop-deg", "180"]
    assert run(place, *labelled, *gates) == 0
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert found["images"] == "4 images of cases.csv, split val" and found["cuda"] is None
    first, peer = found["models"]
    assert (first["name"], peer["name"]) == ("tiny", "published")
    assert (first["trained"], peer["trained"]) == (True, False)
    assert first["slower"] is None and peer["slower"]["value"] > 0
    assert first["errors"]["mre_px"]["value"] > 0 and peer["errors"] is None
    assert first["images"] == 2 * (1 + timing.QUICK_ROUNDS)
    assert list(first["milliseconds"]) == ["image", "preprocess", "inference", "decode"]
    assert set(first["images_per_second"]) <= {"1", "2", "4", "8"}
    assert first["footprint"]["start_ms"] > 0
    picture = cv2.imread(str(tmp_path / "benchmark.png"))
    assert picture is not None and picture.std() > 1
    text, said = capsys.readouterr()
    assert "CUDA: unmeasured (no CUDA provider)" in text and text.count("ok     ") == 3
    assert "export.benchmark:" not in said


def test_a_failed_gate_is_named(place, capsys):
    assert run(place, "--budget-ms", "0.0001", "--least-ratio", "published=1e9") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "budget 0.0001 ms" in said and "expected at least 1e+09" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--most-mre-px", "9"], "--most-mre-px needs a case table: add --data cases.csv"),
        (["--images", "."], "--images needs a case table"),
        (
            ["--least-ratio", "unet=60"],
            "--least-ratio unet: expected one of the other models: published",
        ),
        (["--least-ratio", "tiny=1"], "--least-ratio tiny: expected"),
        (["--peer", "tiny=other.safetensors"], "a model and a peer are called tiny"),
        (["--model", "tiny=other.onnx"], "two models are called tiny"),
        (["--peers", "--peer", "more=missing.onnx"], "no model file at missing.onnx"),
        (["--data", "missing.csv"], "missing.csv: the table cannot be read"),
        (["--input", "missing"], "no image below missing"),
        (["--data", "a.csv", "--input", "."], "leave one out"),
        (["--peers", "--provider", "cuda"], "--provider cuda: this ONNX Runtime has no CUDA"),
    ],
)
def test_what_cannot_be_measured(place, options, words, capsys):
    if "cuda" in options and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("there is a CUDA provider here")
    assert run(place, *options) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("export.benchmark: ") and words in said


def test_no_case_of_a_split(place, tmp_path, capsys):
    write_cases(tmp_path / "cases.csv", [Case("a.png", phantom(1).landmarks_px, 100.0)])
    assert run(place, "--data", str(tmp_path / "cases.csv")) == 2
    assert "no case has split 'val': pass another --split" in capsys.readouterr().err


def test_a_file_is_exported_once_and_again_when_it_changes(place, tiny, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("exported again")

    cache = place / "cache"
    peers.random_peer("published", published, cache)
    monkeypatch.setattr(peers, "_write_onnx", refuse)
    assert peers.trained_model("tiny", place / "run", cache).file == tiny
    peers.random_peer("published", published, cache)
    with pytest.raises(AssertionError):  # the same name, another network
        peers.random_peer("published", lambda: (build_network(SMALL), published()[1]), cache)


def test_an_exported_peer_answers_as_its_network(place):
    found = peers.random_peer("published", published, place / "cache")
    torch.manual_seed(0)  # as random_peer does
    network = published()[0].eval()
    image = np.random.default_rng(0).normal(size=(1, 1, 64, 64)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(image)).numpy()
    assert expected.shape == (1, 3, 8, 8)
    np.testing.assert_allclose(
        load_predictor(found.file, "cpu").run(image).maps, expected, atol=1e-5
    )


def test_costs_of_the_peers():
    with torch.device("meta"):
        costs = {name: peers.network_cost(*source()) for name, source in peers.PEERS.items()}
    gmac = {name: cost[1] for name, cost in costs.items()}
    assert gmac == pytest.approx({"paper": 83, "published": 123, "unet": 193}, abs=0.6)
    assert costs["published"][0] > costs["paper"][0]
    assert RECIPES.keys() >= {"paper", "unet"} and PAPER.spec().stride == 8


def test_cost_of_a_file_is_that_of_its_network(place, tiny, tmp_path):
    known = peers.trained_model("tiny", place / "run", place / "cache")
    of_recipe = peers.trained_model("tiny", tiny, place / "cache")
    assert (of_recipe.parameters, of_recipe.gmac) == (known.parameters, known.gmac)
    model = onnx.load(tiny)
    spec = ModelSpec.model_validate_json(model.metadata_props[0].value)
    plain = spec.model_copy(update={"recipe": {}}).model_dump_json()
    onnx.helper.set_model_props(model, {METADATA_KEY: plain})
    onnx.save(model, tmp_path / "bare.onnx")
    bare = peers.trained_model("bare", tmp_path / "bare.onnx", place / "cache")
    assert bare.gmac is None and bare.parameters == pytest.approx(known.parameters, rel=0.2)


def test_the_shipped_models_are_those_of_process_py():
    assert (process.SHIPPED_MODEL, process.SHIPPED_FOR_CPU) == (
        benchmark.SHIPPED,
        benchmark.SHIPPED_FOR_CPU,
    )
    options = benchmark.parse_benchmark_options(["--provider", "cpu"], peers.PEERS)
    assert options.models == {
        "shipped": process.SHIPPED_FOR_CPU,
        "float32": process.SHIPPED_MODEL,
    }
    costs = [peers.trained_model("", path, Path()) for path in options.models.values()]
    assert costs[0].parameters == costs[1].parameters and costs[0].gmac == costs[1].gmac
    assert costs[0].gmac == pytest.approx(2 * 2.1, abs=0.1)  # two networks
