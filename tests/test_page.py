"""The page at /, in headless Chromium, on the bundled model."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest
from serving import QUESTION, is_loud, serving, vectors, write_vectors

from localsteer import bundled

pytest.importorskip("fastapi", reason="the extra localsteer[serve] is not installed")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not bundled.is_available(), reason="no bundled model in this copy"),
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no browser: apt-get install chromium chromium-driver"
    ),
]
BY = "css selector"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(write_vectors(tmp_path_factory.mktemp("vectors"))) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = CHROMIUM
    # no sandbox: the containers that CI runs in give Chromium none; no proxy: the server is on this machine
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "no-proxy-server"):
        options.add_argument(f"--{flag}")
    options.add_argument("--window-size=1280,860")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def page(server, browser):
    browser.get(server.url)
    wait(lambda: browser.find_elements(BY, ".vector"))
    fill(browser, "#temperature", "0")
    return browser


def wait(condition, seconds=40.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come")


def fill(page, css, text):
    field = page.find_element(BY, css)
    field.clear()
    field.send_keys(text)


def switch(page, name):
    page.find_element(BY, f".vector[data-name={name}] [role=switch]").click()


def ask(page, question=QUESTION):
    fill(page, "#question", question)
    page.find_element(BY, "#send").click()
    wait(lambda: page.find_element(BY, "body").get_attribute("data-busy") == "false")


def texts(page, kind):
    return [each.text for each in page.find_elements(BY, f".reply.{kind} .text")]


def test_a_plain_chat_of_two_turns(page):
    ask(page)
    ask(page, "And what is a river?")
    assert len(texts(page, "plain")) == 2 and all(texts(page, "plain"))
    assert texts(page, "steered") == []
    assert [each.text for each in page.find_elements(BY, ".question")] == [QUESTION, "And what is a river?"]
    page.find_element(BY, "#clear").click()
    assert not page.find_elements(BY, ".turn")


def test_a_new_chat_holds_nothing_of_a_reply_that_was_still_coming(page):
    page.execute_script(
        "events = async function* () { yield { choices: [{ delta: { content: 'old' } }] };"
        " await new Promise((done) => setTimeout(done, 500)); }"
    )
    fill(page, "#question", QUESTION)
    page.find_element(BY, "#send").click()
    wait(lambda: texts(page, "plain") == ["old"])
    page.find_element(BY, "#clear").click()
    wait(lambda: page.find_element(BY, "body").get_attribute("data-busy") == "false")
    assert page.execute_script("return [histories.plain.length, histories.steered.length]") == [0, 0]


def test_vectors_show_their_settings(page):
    names = [each.text for each in page.find_elements(BY, ".vector .name")]
    assert names == ["json", "lowercase", "uppercase"]
    for name, vector in vectors().items():
        note = page.find_element(BY, f".vector[data-name={name}] .note").text
        assert note == f"block {vector.layers[0]}, project, positions {vector.positions}"


def test_plain_and_steered_side_by_side_with_the_projection_of_each_token(page):
    switch(page, "uppercase")
    ask(page)
    (plain,), (steered,) = texts(page, "plain"), texts(page, "steered")
    assert is_loud(steered) and not is_loud(plain)
    boxes = [page.find_element(BY, f".reply.{kind}").rect for kind in ("plain", "steered")]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    tokens = page.find_elements(BY, ".projection .token:not(.prompt)")
    assert "".join(each.get_attribute("textContent") for each in tokens).startswith(steered[:20])
    titles = [each.get_attribute("title") for each in page.find_elements(BY, ".projection .token")]
    assert sum("1.00 steered" in title for title in titles) >= 1  # where it steers, it reaches its target
    page.find_element(BY, "#chat")
    page.execute_script("document.getElementById('chat').scrollTop = 0")
    if os.environ.get("LOCALSTEER_SCREENSHOT"):
        page.save_screenshot(os.environ["LOCALSTEER_SCREENSHOT"])


def test_the_slider_sets_the_strength(page):
    """At 0 the steered reply is the plain one."""
    switch(page, "uppercase")
    set_slider(page, "uppercase", 0)
    ask(page)
    assert texts(page, "plain") == texts(page, "steered")
    assert page.find_element(BY, ".reply.steered .who").text == "uppercase 0.00"
    set_slider(page, "uppercase", 1)
    page.find_element(BY, "#clear").click()
    ask(page)
    assert is_loud(texts(page, "steered")[0])


def set_slider(page, name, value):
    page.execute_script(
        "const slider = document.querySelector(`.vector[data-name=${arguments[0]}] [type=range]`);"
        "slider.value = arguments[1]; slider.dispatchEvent(new Event('input'));",
        name, value,
    )  # fmt: skip


def test_two_vectors_at_once_and_only_the_steered_reply(page):
    page.find_element(BY, "#compare").click()
    for name in ("json", "lowercase"):
        switch(page, name)
    ask(page)
    assert texts(page, "plain") == []
    assert page.find_element(BY, ".reply.steered .who").text == "json 1.00 + lowercase 1.00"
    assert len(page.find_elements(BY, ".projection .tokens")) == 2


def test_what_goes_wrong_is_said(page, server):
    page.execute_script("document.getElementById('temperature').value = 7")
    ask(page)
    assert "temperature" in page.find_element(BY, ".reply .error").text
    fill(page, "#temperature", "0")
    switch(page, "json")
    server.state.vectors.entries = {}
    try:
        ask(page)
        assert "no vector 'json'" in page.find_element(BY, ".reply.steered .error").text
    finally:
        server.state.vectors.reload()


def test_text_is_never_html(page):
    ask(page, "<img src=x onerror=document.title='broken'> foxes")
    assert page.find_element(BY, ".question").text.startswith("<img")
    assert page.title == "localsteer"


def test_nothing_is_loaded_from_elsewhere_and_nothing_is_refused(page, server):
    """The network log of the whole page, a chat and a trace; and no complaint in its console."""
    page.get_log("browser"), page.get_log("performance")
    page.get(server.url)
    wait(lambda: page.find_elements(BY, ".vector"))
    switch(page, "json")
    ask(page)
    page.get(f"{server.url}/docs")
    wait(lambda: page.find_elements(BY, "#paths details"))
    sent = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [
        each["params"]["request"]["url"] for each in sent if each["method"] == "Network.requestWillBeSent"
    ]
    assert any(url.endswith("/v1/steering/trace") for url in urls)
    assert all(url.startswith((server.url, "data:")) for url in urls), urls
    severe = [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert [each for each in severe if "favicon" not in each] == []


def test_a_key_is_asked_for(tmp_path, browser):
    from localsteer.server.security import Access

    with serving(write_vectors(tmp_path / "v"), access=Access(api_key="a-key-of-sixteen")) as server:
        browser.get(server.url)
        wait(lambda: browser.find_element(BY, "#access").is_displayed())
        assert not browser.find_elements(BY, ".vector")
        fill(browser, "#key", "a-key-of-sixteen")
        browser.find_element(BY, "#access button").click()
        wait(lambda: browser.find_elements(BY, ".vector"))
        assert not browser.find_element(BY, "#access").is_displayed()


def test_the_page_is_in_the_installed_package():
    from importlib.resources import files

    folder = files("localsteer.server").joinpath("page")
    for name in ("index.html", "page.css", "page.js", "docs.html", "docs.js"):
        assert len(folder.joinpath(name).read_bytes()) > 100
