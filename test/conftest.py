"""Shared fixtures. The real images are found through AOP_DATA or beside the repository."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark `browser` every test that asks for Chromium, directly or through a fixture."""
    for item in items:
        if "chromium" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")


@pytest.fixture(scope="session")
def psfhs() -> Path:
    """The PSFHS folder (images/, masks/, cases.csv, original_format/), or a skip."""
    folder = Path(os.environ.get("AOP_DATA", ROOT.parent / "shared" / "data")) / "psfhs"
    if not (folder / "cases.csv").is_file():
        pytest.skip("the real images are not here; AOP_DATA names the folder that holds psfhs/")
    return folder
