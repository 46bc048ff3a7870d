"""Makes the pictures of the page in docs/, with Chromium and the model `smol`: python docs/record_page.py"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

DOCS = Path(__file__).parent
FLAGS = ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1280,860")
COLOURS = 128  # of a picture: text on plain ground needs few
MOST_BYTES = 200_000
SECONDS = 900.0  # on a machine that has much else to do
BY = "css selector"


@contextmanager
def serving(folder: str) -> Iterator[str]:
    """The address of a server on smol."""
    words = ("serve", "-m", "smol", "--vectors", folder, "--port", "0", "--predict", "110", "--json")
    environment = {**os.environ, "LOCALSTEER_NICE": "0"}  # nobody else is answered here
    process = subprocess.Popen(
        [sys.executable, "-m", "localsteer", *words], stdout=subprocess.PIPE, text=True, env=environment
    )
    text = ""
    try:
        while not text.endswith("}\n"):
            line = process.stdout.readline()
            if not line:
                raise SystemExit("the server did not start")
            text += line
        yield json.loads(text)["url"]
    finally:
        process.terminate()
        process.wait()


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    options = Options()
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def wait(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > until:
            raise SystemExit("it did not come")
        time.sleep(0.1)


def fill(page: webdriver.Chrome, css: str, text: str) -> None:
    field = page.find_element(BY, css)
    field.clear()
    field.send_keys(text)


def shoot(page: webdriver.Chrome, name: str) -> None:
    path = DOCS / name
    page.save_screenshot(str(path))
    Image.open(path).convert("RGB").quantize(COLOURS).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path} ({size} bytes)")
    if size > MOST_BYTES:
        raise SystemExit(f"{name} has more than {MOST_BYTES} bytes")


def reply_in_json(page: webdriver.Chrome) -> None:
    """Plain beside steered, with the projection of each token."""
    fill(page, "#temperature", "0")
    page.find_element(BY, ".vector[data-name=json] [role=switch]").click()
    fill(page, "#question", "Tell me about foxes.")
    page.find_element(BY, "#send").click()
    wait(lambda: page.find_element(BY, "body").get_attribute("data-busy") == "false")
    page.execute_script("document.getElementById('chat').scrollTop = 0")


def search(page: webdriver.Chrome) -> None:
    """A sentence of one's own on its way, once there is a best so far."""
    fill(page, "#sentence", "Answer as a list of three facts.")
    page.find_element(BY, "#begin").click()
    wait(lambda: page.find_element(BY, "#job-best").text or page.find_element(BY, "#outcome").is_displayed())
    page.execute_script("const aside = document.querySelector('aside'); aside.scrollTop = aside.scrollHeight")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, serving(folder) as url, browser() as page:
        page.get(url)
        wait(lambda: page.find_elements(BY, ".vector"))
        reply_in_json(page)
        shoot(page, "page.png")
        search(page)
        shoot(page, "page-search.png")


if __name__ == "__main__":
    main()
