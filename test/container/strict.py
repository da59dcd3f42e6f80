"""process.py as its users run it: in a process of its own, or in the container.

If AOP_IMAGE names an image, the tests run it under the flags of a challenge platform. Otherwise the
same tests run `python process.py`.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMAGE = os.environ.get("AOP_IMAGE", "")
FLAGS = [
    *("--rm", "--network", "none", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--read-only", "--tmpfs", "/tmp", "--pids-limit", "256", "--memory", "4g"),
    *("--shm-size", "128m"),
]


@dataclass
class Outcome:
    """The outcome of a run; `results` is results.json, or {} if there is none."""

    status: int
    out: str
    err: str
    results: dict

    @property
    def sentence(self) -> str:
        """The last line of stderr."""
        return self.err.splitlines()[-1]

    def entry(self, file: str) -> dict:
        (found,) = [entry for entry in self.results["cases"] if entry["file"] == file]
        return found


def command(
    source: Path, output: Path, *options: str, models: Path | None = None, name: str = ""
) -> list[str]:
    """The command line of a run, with or without the container; `name` is the container's."""
    if not IMAGE:
        model = [f"--model={next(models.iterdir())}"] if models else []
        paths = [f"--input={source}", f"--output={output}"]
        return [sys.executable, str(ROOT / "process.py"), *paths, *model, *options]
    output.mkdir(exist_ok=True)
    output.chmod(0o777)  # for the image's own user
    mounts = ["-v", f"{source}:/input:ro", "-v", f"{output}:/output"]
    mounts += ["-v", f"{models}:/opt/ml/model:ro"] if models else []
    user = [] if os.getuid() == 0 else ["--user", f"{os.getuid()}:{os.getgid()}"]
    named = ["--name", name] if name else []
    return ["docker", "run", *FLAGS, *user, *named, *mounts, IMAGE, *options]


def run(source: Path, output: Path, *options: str, models: Path | None = None) -> Outcome:
    """Run to the end and collect the outcome."""
    ran = subprocess.run(
        command(source, output, *options, models=models),
        capture_output=True,
        text=True,
        errors="backslashreplace",
        check=False,
        timeout=3600,
    )
    return Outcome(ran.returncode, ran.stdout, ran.stderr, results_in(output))


def results_in(output: Path) -> dict:
    path = output / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
