"""What the image installs, and what none of our code may do."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIN = re.compile(r"([\w.-]+)(?:\[[\w,]+\])?==(\S+)(?: --hash=sha256:([0-9a-f]{64}))?")


def pins(path: Path) -> dict[str, tuple[str, str | None]]:
    """Package -> version and digest (None without one)."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    found = [PIN.fullmatch(line) for line in lines]
    assert all(found), lines
    return {match[1].lower().replace("_", "-"): (match[2], match[3]) for match in found}


@pytest.mark.parametrize("runtime", ["cpu", "cuda"])
def test_the_image_installs_what_is_pinned_with_its_digest(runtime: str) -> None:
    locked = pins(ROOT / "model" / "locks" / f"{runtime}.txt")
    assert all(digest for _, digest in locked.values())
    for name, (version, _) in pins(ROOT / "requirements.txt").items():
        wanted = "onnxruntime-gpu" if (name, runtime) == ("onnxruntime", "cuda") else name
        assert locked[wanted][0] == version, f"run test/lock.sh: {name}"
    assert not {"torch", "torchvision", "onnx"} & {*locked}


def test_the_dockerfile() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert "--require-hashes" in text and re.search(r"^USER [1-9]\d+:[1-9]\d+$", text, re.MULTILINE)
    assert not re.search(r"^(# syntax|ADD )|--mount|<<", text, re.MULTILINE)


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize(
    "path",
    [ROOT / "process.py", *sources("model", "training", "export")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_pickle_is_loaded_and_no_code_is_made(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & {"joblib", "dill", "marshal", "shelve", "yaml"}
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            assert node.attr == "UnpicklingError"
        assert not (isinstance(node, ast.ImportFrom) and node.module == "pickle")
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            known = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in {"eval", "exec", "os.system"}
            assert called != "torch.load" or known.get("weights_only") == "True"
            assert known.get("allow_pickle", "False") == "False"
