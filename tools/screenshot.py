"""Draws docs/app.png: the page of app.py in headless Chromium, with a bundled sample fused.

python -m tools.screenshot

Needs gradio and selenium (requirements-dev.txt), and Chromium with its driver (apt-get install chromium
chromium-driver). The browser test drives the page with what is here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from utils.common import ROOT, InputError, in_checkout, run_script, whole_file

SAMPLE = 2  # street_night, in the order of the page
SIZE = (1240, 1000)  # of the window; the picture is as high as the page
PATIENCE_S = 180  # for one step of the page, on a machine that is busy with other work


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=in_checkout("docs", "app.png"))
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return run_script(draw, parser.parse_args(argv))


def draw(args: argparse.Namespace) -> int:
    missing = what_is_missing()
    if missing:
        raise InputError(missing)
    with served() as address, browser(SIZE) as page:
        page.get(address)
        click_sample(page, SAMPLE)
        wait_for(page, lambda: find(page, "#scores table") and pictures_loaded(page))
        height = page.execute_script("return document.documentElement.scrollHeight")
        page.set_window_size(SIZE[0], height + SIZE[1] - page.execute_script("return window.innerHeight"))
        wait_for(page, lambda: pictures_loaded(page))
        picture = cv2.imdecode(np.frombuffer(page.get_screenshot_as_png(), np.uint8), cv2.IMREAD_COLOR)
    # 6 bits a channel are not told from 8 by eye here, and take two thirds of the bytes.
    encoded = cv2.imencode(".png", picture & 0xFC | 2, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1]
    with whole_file(args.out) as temporary:
        encoded.tofile(temporary)
    print(f"{args.out}: {picture.shape[1]}x{picture.shape[0]}, {encoded.size / 1000:.0f} kB")
    return 0


def what_is_missing() -> str:
    """Why the page cannot be driven here, and what to install; empty where it can."""
    packages = [name for name in ("gradio", "selenium") if not importlib.util.find_spec(name)]
    if packages:
        return f"not installed: {', '.join(packages)}; run: pip install {' '.join(packages)}"
    programs = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    if programs:
        return f"not installed: {', '.join(programs)}; run: apt-get install chromium chromium-driver"
    return ""


@contextlib.contextmanager
def served(*options: object) -> Iterator[str]:
    """app.py on a free port in a process of its own, ended by SIGTERM: its address."""
    command = [sys.executable, str(ROOT / "app.py"), "--port", "0", "--device", "cpu", *map(str, options)]
    # Its own folder is not the checkout: nothing may depend on where the page is started.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=os.sep, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    too_late = threading.Timer(PATIENCE_S, process.kill)
    too_late.start()
    try:
        address = next((line.split()[0] for line in process.stdout if line.startswith("http")), None)
        too_late.cancel()
        if not address:
            raise InputError(f"app.py ended with code {process.wait()} before the page was there")
        yield address
    finally:
        too_late.cancel()
        process.terminate()
        process.wait(PATIENCE_S)
        process.stdout.close()


@contextlib.contextmanager
def browser(size: tuple[int, int] = SIZE, downloads: Path | None = None) -> Iterator[Any]:
    """Headless Chromium, driven by selenium; it saves what it downloads in a folder, without asking."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # Containers run as root, where Chromium has no sandbox, and have a small /dev/shm.
    width, height = size
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", f"window-size={width},{height}"):
        options.add_argument(f"--{argument}")
    if downloads:
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def find(page: Any, selector: str) -> list[Any]:
    """The elements that a CSS selector names and that are seen."""
    return [element for element in page.find_elements("css selector", selector) if element.is_displayed()]


def wait_for(page: Any, condition: Any) -> Any:
    """What a condition gives as soon as it gives something; elements that the page replaces meanwhile are no error."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    waiting = WebDriverWait(page, PATIENCE_S, ignored_exceptions=[StaleElementReferenceException])
    return waiting.until(lambda _: condition())


def click_sample(page: Any, number: int) -> None:
    wait_for(page, lambda: len(find(page, "#samples .thumbnail-item")) > number)
    find(page, "#samples .thumbnail-item")[number].click()


def pictures_loaded(page: Any) -> bool:
    return page.execute_script("return [...document.images].every(image => image.complete && image.naturalWidth > 0)")


if __name__ == "__main__":
    sys.exit(main())
