"""A headless Chromium for the tests of pages.

A module whose tests use `browser` sets pytest_plugins = ["test.support.browser"]. It also imports
functions from here, before pytest could rewrite their assertions. They have none, and
PYTEST_DONT_REWRITE keeps pytest from warning.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DESKTOP, PHONE = (1280, 900), (360, 740)  # CSS px
SWITCHES = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic "
    "--no-first-run --disable-background-networking --disable-component-update --disable-sync"
)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One Chromium for all tests, driven by selenium; `downloads` is its download folder."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (found and driver):
        reason = "no chromium and chromedriver here (Debian: apt-get install chromium-driver)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = found
    for switch in SWITCHES.split():
        options.add_argument(switch)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(executable_path=driver))
    started.downloads = tmp_path_factory.mktemp("downloads")
    where = {"behavior": "allow", "downloadPath": str(started.downloads)}
    started.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    yield started
    started.quit()


@pytest.fixture
def browser(chromium: Any) -> Iterator[Any]:
    """The Chromium with an empty page of desktop size and an empty log."""
    resize(chromium, DESKTOP)
    chromium.get("about:blank")
    chromium.get_log("browser")
    yield chromium
    chromium.get("about:blank")  # so that nothing of the last page runs on in the next test
    stored = {"origin": "file://", "storageTypes": "local_storage"}
    chromium.execute_cdp_cmd("Storage.clearDataForOrigin", stored)


def resize(browser: Any, size: tuple[int, int]) -> None:
    """Set the page's (width, height) in CSS px; a page of a phone's width also has touch."""
    phone = size[0] < 600
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": phone}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})


def complaints(browser: Any) -> list[str]:
    """The console's messages since the last call: errors, blocked and missing files."""
    return [line["message"] for line in browser.get_log("browser")]


def overflowing(browser: Any) -> list[str]:
    """The elements that reach beyond the page's sides, except those that scroll on their own."""
    return browser.execute_script("""
        const width = document.documentElement.clientWidth, found = [];
        if (document.documentElement.scrollWidth > width) found.push("the page scrolls sideways");
        for (const element of document.body.querySelectorAll("*")) {
          if (element.closest(".wide, svg, [hidden]")) continue;
          const box = element.getBoundingClientRect();
          if (box.width && (box.right > width + 0.5 || box.left < -0.5))
            found.push(`${element.tagName}.${element.className} ${box.left} to ${box.right}`);
        }
        return found;""")


def picture(browser: Any, path: Path, whole: bool = False) -> None:
    """Save the visible part of the page, or the `whole` page, as a PNG."""
    import base64

    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": whole})
    path.write_bytes(base64.b64decode(taken["data"]))
