"""The page in Chromium: no error, no request, every picture drawn, nothing wider than a phone, light and dark."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastmoco.report_page.page import make_page, write_page
from fastmoco.report_page.run_files import read_run
from tests.report_page.sample_run import picture, write_run

pytestmark = pytest.mark.slow
LONG = "a-run-with-a-name-that-is-much-longer-than-the-screen-of-a-phone-is-wide-" * 2
UNDRAWN = """
return [...document.images].filter((image) => !image.complete || image.naturalWidth === 0 || image.width === 0)
  .map((image) => image.alt)
  .concat([...document.querySelectorAll("svg")].filter((svg) => svg.getBBox().width === 0 || svg.clientHeight < 80)
  .map((svg) => svg.getAttribute("aria-label")))
"""
SMALLEST_TEXT_PX = """
return Math.min(...[...document.querySelectorAll("svg text")].map(
  (text) => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a))
"""
WIDER_THAN_THE_SCREEN = "const page = document.documentElement; return page.scrollWidth - page.clientWidth"
COLOURS = """
const path = document.querySelector("svg path[style*='--line-1']"), body = getComputedStyle(document.body);
return [body.backgroundColor, body.color, getComputedStyle(path).stroke]
"""


@pytest.fixture(scope="module")
def browser(require_backend: Callable[[str], None]) -> Iterator[Any]:
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing:  # packages of the system, which not every machine can install
        pytest.skip(f"{' and '.join(missing)}: not installed")
    require_backend("selenium")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    run = write_run(folder / LONG, state="failed", message=f"{LONG} is not finite")
    picture(run / "views.png", 2400, 700)
    other = write_run(folder / "other", settings={"lr": 0.06}, evaluated=False)
    paths = {"run": folder / "run.html", "comparison": folder / "comparison.html"}
    write_page(make_page([read_run(run)]), paths["run"])
    write_page(make_page([read_run(run), read_run(other)]), paths["comparison"])
    return paths


@pytest.mark.parametrize("name", ["run", "comparison"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_whole_at_both_widths_and_in_both_schemes(
    browser: Any, pages: dict[str, Path], name: str, width: int
) -> None:
    assert pages[name].stat().st_size < 2_000_000
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    colours = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        browser.get(pages[name].as_uri())
        browser.execute_script("document.querySelectorAll('details').forEach((details) => { details.open = true })")
        assert browser.execute_script(UNDRAWN) == []
        assert browser.execute_script(WIDER_THAN_THE_SCREEN) == 0
        assert browser.execute_script(SMALLEST_TEXT_PX) >= 9.5
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert [entry for entry in loaded if not entry.startswith("data:")] == []
        colours.append(browser.execute_script(COLOURS))
    assert browser.get_log("browser") == []
    assert all(light != dark for light, dark in zip(*colours, strict=True)), colours


def test_a_command_is_copied_by_its_button(browser: Any, pages: dict[str, Path]) -> None:
    browser.get(pages["run"].as_uri())
    button = browser.find_element("css selector", ".command button")
    button.click()
    selected = browser.execute_script("return getSelection().toString()")
    assert selected == browser.find_element("css selector", ".command code").text.strip()
    assert selected.startswith("fastmoco train --resume")
    assert browser.execute_async_script(
        "const button = arguments[0], done = arguments[1];"
        "const wait = () => button.textContent === 'Copied' ? done(true) : setTimeout(wait, 10); wait()",
        button,
    )
