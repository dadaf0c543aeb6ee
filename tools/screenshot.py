"""Draws docs/app.png, app_phone.png and app_dark.png: the page of app.py in headless Chromium, with a sample fused.

python -m tools.screenshot

Needs gradio and selenium (requirements-dev.txt), and Chromium with its driver (apt-get install chromium
chromium-driver). The browser test drives the page with what is here.
"""

import argparse
import base64
import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from utils.common import ROOT, InputError, in_checkout, run_script, whole_file

VIEWS = {"app": (1280, "light"), "app_phone": (390, "light"), "app_dark": (1280, "dark")}  # width in pixels, colours
PATIENCE_S = 180  # for one step of the page, on a machine that is busy with other work


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=in_checkout("docs"), metavar="DIR", help="default: docs")
    parser.add_argument("--language", default="en", help="that the browser asks for (default: en)")
    parser.add_argument("--sample", type=int, default=0, help="in the order of the page, from 0")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return run_script(draw, parser.parse_args(argv))


def draw(args: argparse.Namespace) -> int:
    if missing := what_is_missing():
        raise InputError(f"not installed: {missing}; see the start of tools/screenshot.py")
    with served() as address, browser(language=args.language) as page:
        for name, (width, colours) in VIEWS.items():
            show(page, address, width, colours)
            find(page, "#samples .thumbnail-item")[args.sample].click()
            wait_for(page, lambda: find(page, "#scores table") and find(page, "#results img") and pictures_loaded(page))
            picture = page.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})["data"]
            picture = cv2.imdecode(np.frombuffer(base64.b64decode(picture), np.uint8), cv2.IMREAD_COLOR)
            # 6 bits a channel are not told from 8 by eye here, and take two thirds of the bytes.
            encoded = cv2.imencode(".png", picture & 0xFC | 2, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1]
            with whole_file(args.out / f"{name}.png") as temporary:
                encoded.tofile(temporary)
            print(f"{args.out / name}.png: {picture.shape[1]}x{picture.shape[0]}, {encoded.size / 1000:.0f} kB")
    return 0


def what_is_missing() -> str:
    """The packages and programs without which the page cannot be driven."""
    packages = [name for name in ("gradio", "selenium") if not importlib.util.find_spec(name)]
    return ", ".join(packages + [name for name in ("chromium", "chromedriver") if not shutil.which(name)])


@contextlib.contextmanager
def served(*options: object, **environment: str) -> Iterator[str]:
    """app.py on a free port in a process of its own, ended by SIGTERM: its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(port), "--device", "cpu", *map(str, options)]
    # Its own folder is not the checkout: nothing may depend on where the page is started.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=os.sep, env=os.environ | environment)
    try:
        address = next((line.split()[0] for line in process.stdout if line.startswith("http")), None)
        if not address:
            raise InputError(f"app.py ended with code {process.wait()} before the page was there")
        yield address
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        process.stdout.close()


@contextlib.contextmanager
def browser(downloads: Path | None = None, language: str = "en") -> Iterator[Any]:
    """Headless Chromium, driven by selenium; it saves what it downloads in a folder, without asking."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage"):  # as root there is no sandbox
        options.add_argument(f"--{argument}")
    settings = {"intl.accept_languages": language, "download.default_directory": str(downloads or os.devnull)}
    options.add_experimental_option("prefs", settings)
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
