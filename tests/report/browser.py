"""A real headless Chromium for tests, where the machine has one."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser that logs its console and its requests; skips the test where there is none."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next((path for name in names if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no Chromium with its driver here (Debian: chromium, chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


def show(browser: Any, address: str, width: int = 1200, dark: bool = False) -> None:
    """Opens a page at a width in CSS pixels and waits until its charts are drawn."""
    features = [
        {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
        {"name": "prefers-reduced-motion", "value": "reduce"},  # scrolls at once
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(address)
    wait(browser, "return document.body.dataset.drawn")


def show_still(browser: Any, address: str) -> None:
    """The page as `show` leaves it, opened only where another one, or another width, was shown."""
    there = browser.current_url == address
    if not there or browser.execute_script("return window.innerWidth") != 1200:
        show(browser, address)


def wait(browser: Any, script: str, seconds: float = 60) -> Any:
    """The first true value that a script returns."""
    until = time.monotonic() + seconds
    while not (value := browser.execute_script(script)):
        assert time.monotonic() < until, f"waited {seconds:g} s for {script}"
        time.sleep(0.1)
    return value


def requests(browser: Any) -> list[str]:
    """What was asked of any network since the last `show`."""
    messages = [json.loads(one["message"])["message"] for one in browser.get_log("performance")]
    asked = [
        one["params"]["request"]["url"]
        for one in messages
        if one["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in asked if not url.startswith(("data:", "blob:"))]
