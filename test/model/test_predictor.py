"""The ModelSpec in an ONNX file, the predictor that runs the file, and files that are refused."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from model.frame import Letterbox, input_to_cells
from model.images.grey import to_grey
from model.masks import landmarks_from_shares
from model.predictor import (
    ModelError,
    Output,
    Predictor,
    decode_output,
    grey_levels,
    load_predictor,
    usable_cpus,
)
from model.spec import METADATA_KEY, ModelSpec, SpecError, parse_spec
from test.phantom import phantom

SPEC = ModelSpec(input_size=64, mean=30.0, std=50.0, stride=4, sigma_cells=1.5)


def write_model(path: Path, spec_text: str | None, cells: int = 16) -> Path:
    """A model that returns its input averaged over 4 x 4 px, three times."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 64, 64])
    heatmaps = helper.make_tensor_value_info("heatmaps", TensorProto.FLOAT, ["n", 3, cells, cells])
    nodes = [
        helper.make_node(
            "AveragePool", ["image"], ["pooled"], kernel_shape=[4, 4], strides=[64 // cells] * 2
        ),
        helper.make_node("Concat", ["pooled"] * 3, ["heatmaps"], axis=1),
    ]
    graph = helper.make_graph(nodes, "test", [image], [heatmaps])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if spec_text is not None:
        helper.set_model_props(model, {METADATA_KEY: spec_text})
    onnx.save(model, path)
    return path


def test_predictor_maps_heatmaps_back_to_the_image():
    truth = np.array([[70.0, 31.5], [20.0, 55.25], [101.0, 88.0]])
    grey = np.random.default_rng(1).uniform(0, 255, (96, 128)).astype(np.float32)
    box = Letterbox(128, 96, 64)
    heatmaps = SPEC.codec.encode(input_to_cells(box.to_input(truth), 4))
    seen = []

    def run(network_input):
        seen.append(network_input)
        return Output(heatmaps[None])

    found = Predictor(SPEC, run, "test").predict(grey)
    np.testing.assert_allclose(found.landmarks_px, truth, atol=0.05)
    np.testing.assert_allclose(seen[0][0], SPEC.normalise(box.apply(grey)))
    assert set(found.milliseconds) == {"preprocess", "inference", "decode"}
    coarse = Predictor(SPEC, run, "test").predict(grey, decode="argmax")
    assert 0.05 < np.abs(coarse.landmarks_px - truth).max() <= 4.01  # half a cell: 4 px here


def output_with_masks(heatmap_points, mask):
    """The output of a perfect network: heatmaps of some landmarks, shares of a mask's classes."""
    heatmaps = SPEC.codec.encode(input_to_cells(heatmap_points, 4))
    shares = [
        cv2.resize((mask == k).astype(np.float32), (16, 16), interpolation=cv2.INTER_AREA)
        for k in (1, 2)
    ]
    return np.concatenate([heatmaps, shares])


def test_masks_give_landmarks_of_their_own():
    made = phantom(5, 64, 64)
    found = landmarks_from_shares(output_with_masks(made.landmarks_px, made.mask)[3:], 64)
    np.testing.assert_allclose(found, made.landmarks_px, atol=2.0)  # cells are 4 px wide


@pytest.mark.parametrize("share", [(0.0,) * 3, (0.25,) * 3, (1.0, 0.0, 0.5)])
def test_landmarks_of_heatmaps_and_masks_are_averaged(share):
    made = phantom(5, 64, 64)
    elsewhere = made.landmarks_px + [4.0, 2.0]
    output = output_with_masks(elsewhere, made.mask)
    second = landmarks_from_shares(output[3:], 64)
    spec = SPEC.model_copy(update={"masks": 2, "mask_share": share})
    decoded = decode_output(spec, output)
    weights = np.array(share)[:, None]
    expected = (1 - weights) * elsewhere + weights * second
    np.testing.assert_allclose(decoded.landmarks_px, expected, atol=0.01)
    assert decoded.doubts == () and (decoded.confidence > 0.9).all()


def test_without_outlines_the_heatmaps_answer_in_doubt():
    made = phantom(5, 64, 64)
    output = output_with_masks(made.landmarks_px, np.zeros((64, 64)))
    spec = SPEC.model_copy(update={"masks": 2, "mask_share": (0.75,) * 3})
    decoded = decode_output(spec, output)
    np.testing.assert_allclose(decoded.landmarks_px, made.landmarks_px, atol=0.01)
    assert decoded.doubts == ("no outlines of symphysis and head were found",)


def test_predictor_runs_an_onnx_file(tmp_path):
    predictor = load_predictor(write_model(tmp_path / "m.onnx", SPEC.model_dump_json()), "cpu")
    assert predictor.provider == "cpu" and predictor.spec == SPEC
    image = np.zeros((64, 64), np.uint8)
    image[20:24, 40:44] = 255  # one cell
    found = predictor.predict(image, decode="argmax")
    np.testing.assert_allclose(found.landmarks_px, [[41.5, 21.5]] * 3)


GREY = phantom(5, 96, 64).image
COLOUR = np.dstack([GREY, GREY // 2, 255 - GREY])
LUMINANCE = np.rint(COLOUR @ [0.299, 0.587, 0.114])
WIDE = GREY.astype(np.uint16) * 200
SAME = {  # images that mean the same as GREY
    "signed": GREY.astype(np.int64),
    "uint16 within 0..255": GREY.astype(">u2"),
    "one channel": GREY[..., None],
    "equal channels": np.dstack([GREY] * 3),
    "opaque RGBA": np.dstack([GREY, GREY, GREY, np.full_like(GREY, 255)]),
    "float32": GREY.astype(np.float32),
    "float64": GREY.astype(np.float64),
    "0..1": GREY / 255,
    "0..1 in float32": (GREY / 255).astype(np.float32),
    "0..1 in colour": np.dstack([GREY] * 3) / 255,
    "a list": GREY.tolist(),
    "not contiguous": GREY[:, ::-1].copy()[:, ::-1],
    "PIL": Image.fromarray(GREY),
    "PIL RGB": Image.fromarray(GREY).convert("RGB"),
}


@pytest.mark.parametrize("name", SAME)
def test_one_image_in_many_types_is_the_same(name):
    found = grey_levels(SAME[name])
    assert found.shape == GREY.shape and found.flags.c_contiguous
    assert found.dtype in (np.uint8, np.float32)
    np.testing.assert_allclose(found, GREY, atol=1e-4)


def test_grey_frames_are_passed_on_as_they_are():
    dark = np.zeros((64, 64), np.float32)
    for frame in (GREY, np.zeros_like(GREY), GREY.astype(np.float32)):
        assert grey_levels(frame) is frame
    np.testing.assert_array_equal(grey_levels(dark), dark)


def test_colour_and_wide_ranges_are_read_as_in_files():
    np.testing.assert_allclose(grey_levels(COLOUR), LUMINANCE, atol=1)
    np.testing.assert_allclose(grey_levels(COLOUR / 255), LUMINANCE, atol=1)
    for wide in (WIDE, WIDE.astype(np.float64) - 1000):
        np.testing.assert_array_equal(grey_levels(wide), to_grey(wide))
    assert grey_levels(WIDE).max() == 255
    padded = np.ma.masked_less(np.where(GREY > 99, GREY.astype(np.int16), -1024), 0)
    np.testing.assert_array_equal(grey_levels(padded), np.where(GREY > 99, GREY, 0))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((3, 64, 96), np.float32), ValueError, r"\(3, 64, 96\): move the channels last"),
        (np.zeros((1, 64, 96), np.uint8), ValueError, r"move the channels last"),
        (
            np.zeros((2, 64, 96, 3), np.uint8),
            ValueError,
            r"uint8 of shape \(2, 64, 96, 3\): pass one",
        ),
        (np.zeros((64, 96, 2), np.uint8), ValueError, r"\(64, 96, 2\): pass one image"),
        (np.zeros(64), ValueError, r"float64 of shape \(64,\): pass one image"),
        (np.zeros((0, 64)), ValueError, r"\(0, 64\): pass one image"),
        (GREY > 9, TypeError, r"got bool of shape \(64, 96\): convert"),
        (GREY * 1j, TypeError, r"got complex128"),
        (None, TypeError, r"got object of shape \(\)"),
        ("a.png", TypeError, r"got the path 'a.png': .*open_image"),
        (Path("a.png"), TypeError, r"got the path 'a.png'"),
        (np.where(GREY > 99, np.nan, GREY), ValueError, r"float64 .*: .* NaN or infinite"),
        (np.where(GREY > 99, np.inf, GREY), ValueError, r"float64 .*: .* NaN or infinite"),
        (np.full((64, 96), 999), ValueError, r"constant"),
        (np.zeros((20, 64), np.uint8), ValueError, r"64 x 20 px is too small"),
        (np.dstack([COLOUR, GREY]), ValueError, r"\(64, 96, 4\), partly transparent"),
        (Image.fromarray(GREY).convert("P"), TypeError, r"PIL image of mode P: pass"),
        (Image.fromarray(COLOUR).convert("CMYK"), TypeError, r"PIL image of mode CMYK"),
    ],
)
def test_what_is_no_image_is_refused_in_a_sentence(image, error, message):
    with pytest.raises(error, match=message) as caught:
        Predictor(SPEC, lambda _: pytest.fail("it ran"), "test").predict(image)
    if "too small" not in message:
        assert "expected (height, width) or (height, width, 3) pixels in uint8" in str(caught.value)


@pytest.mark.parametrize("shape", [(0, 1), (1, -1), (1, np.nan), (np.inf, 1), (1,), (1, 1, 1)])
def test_pixel_shape_is_two_positive_numbers(shape):
    predictor = Predictor(SPEC, lambda _: pytest.fail("it ran"), "test")
    with pytest.raises(ValueError, match="expected pixel_shape as two positive numbers"):
        predictor.predict(GREY, shape)


def test_a_path_may_be_text(tmp_path):
    path = write_model(tmp_path / "m.onnx", SPEC.model_dump_json())
    predictor = load_predictor(str(path), "cpu", on_cpu=str(path))
    assert predictor.file == path
    with pytest.raises(ModelError, match=r"no model file at none\.onnx"):
        load_predictor("none.onnx")
    scores = [predictor.predict(image).landmarks_px for image in (GREY, GREY / 255)]
    np.testing.assert_allclose(*scores, atol=1e-3)


def test_grey_is_repeated_for_three_channels():
    spec = SPEC.model_copy(update={"channels": 3})
    assert spec.normalise(np.full((64, 64), 80, np.uint8)).shape == (3, 64, 64)
    assert spec.normalise(np.full((64, 64), 80, np.uint8))[2, 5, 6] == 1.0


OTHER = json.loads(SPEC.model_dump_json())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no ModelSpec"),
        ("{", "ModelSpec"),
        (json.dumps({**OTHER, "schema_version": 2}), "schema_version"),
        (json.dumps({**OTHER, "landmarks": ["PS2", "PS1", "FH1"]}), "landmarks are"),
        (json.dumps({**OTHER, "surprise": 1}), "surprise"),
        (json.dumps({**OTHER, "std": 0}), "std"),
    ],
)
def test_a_model_without_a_usable_spec_is_refused(tmp_path, text, message):
    with pytest.raises(SpecError, match=message):
        parse_spec(text)
    with pytest.raises(ModelError, match=message):
        load_predictor(write_model(tmp_path / "m.onnx", text), "cpu")


def test_a_model_that_contradicts_its_spec_is_refused(tmp_path):
    path = write_model(tmp_path / "m.onnx", SPEC.model_dump_json(), cells=8)
    with pytest.raises(ModelError, match="its spec says"):
        load_predictor(path, "cpu")
    other = SPEC.model_copy(update={"input_size": 128})
    with pytest.raises(ModelError, match="does not run"):
        load_predictor(write_model(path, other.model_dump_json()), "cpu")


def test_files_that_are_no_model_are_refused(tmp_path):
    with pytest.raises(ModelError, match="no model file"):
        load_predictor(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a model" * 100)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_predictor(tmp_path / "bad.onnx")


def test_cuda_is_an_error_where_it_is_not(tmp_path):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(ModelError, match="--provider cuda"):
        load_predictor(write_model(tmp_path / "m.onnx", SPEC.model_dump_json()), "cuda")


def test_cpus_are_counted():
    assert 1 <= usable_cpus() <= 1024


def test_inference_imports_neither_torch_nor_simpleitk():
    code = "import process, sys; print(*({'torch', 'SimpleITK', 'onnx'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.stdout.strip() == ""
