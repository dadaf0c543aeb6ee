"""Draws app.png, app_phone.png and app_dark.png: the page of app.py in headless Chromium, with a sample fused.

python -m tools.screenshot --out screenshots      # app.png is the one in docs/

Needs gradio and selenium (requirements-dev.txt), and Chromium with its driver (apt-get install chromium
chromium-driver). The browser test drives the page with what is here.
"""

import argparse
import base64
import contextlib
import importlib.util
import io
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import app
from utils.common import InputError, Parser, run_script, whole_file

VIEWS = {"app": (1280, "light"), "app_phone": (390, "light"), "app_dark": (1280, "dark")}  # width in pixels, colours
PATIENCE_S = 180  # for one step of the page, on a machine that is busy with other work


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return run_script(draw, parser, argv)


def draw(args: argparse.Namespace) -> int:
    if missing := what_is_missing():
        raise InputError(f"not installed: {missing}; see the start of tools/screenshot.py")
    with app.running(app.build_parser().parse_args([])) as address, browser() as page:
        for name, (width, colours) in VIEWS.items():
            show(page, address, width, colours)
            fuse_sample(page, 0)
            picture = page.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})["data"]
            picture = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
            # 256 well-chosen colours are hardly told from all by eye here, and take half of the bytes.
            picture = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=1)
            with whole_file(args.out / f"{name}.png") as temporary:
                picture.save(temporary, optimize=True)
            print(args.out / f"{name}.png")
    return 0


def what_is_missing() -> str:
    """The packages and programs without which the page cannot be driven."""
    packages = [name for name in ("gradio", "selenium") if not importlib.util.find_spec(name)]
    return ", ".join(packages + [name for name in ("chromium", "chromedriver") if not shutil.which(name)])


@contextlib.contextmanager
def browser(language: str = "en") -> Iterator[Any]:
    """Headless Chromium, driven by selenium, that asks for pages in a language."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage"):  # as root there is no sandbox
        options.add_argument(f"--{argument}")
    options.add_experimental_option("prefs", {"intl.accept_languages": language})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def show(page: Any, address: str, width: int, colours: str = "light") -> None:
    """Opens the page in a window of a width, in light or dark colours."""
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [{"name": "prefers-color-scheme", "value": colours}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.get(address)
    wait_for(page, lambda: find(page, "#samples .thumbnail-item") and pictures_loaded(page))


def fuse_sample(page: Any, number: int) -> None:
    """Clicks a sample and waits for its result."""
    find(page, "#samples .thumbnail-item")[number].click()
    wait_for(page, lambda: find(page, "#scores table") and find(page, "#results img") and pictures_loaded(page))
    wait_for(page, lambda: not find(page, "#cancel"))


def find(page: Any, selector: str) -> list[Any]:
    """The elements that a CSS selector names and that are seen."""
    return [element for element in page.find_elements("css selector", selector) if element.is_displayed()]


def wait_for(page: Any, condition: Callable[[], Any]) -> Any:
    """What a condition gives as soon as it gives something; elements that the page replaces meanwhile are no error."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    waiting = WebDriverWait(page, PATIENCE_S, ignored_exceptions=[StaleElementReferenceException])
    return waiting.until(lambda _: condition())


def pictures_loaded(page: Any) -> bool:
    return page.execute_script("return [...document.images].every(image => image.complete && image.naturalWidth > 0)")


if __name__ == "__main__":
    sys.exit(main())
