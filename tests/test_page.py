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
        assert note == f"layer {vector.layers[0]}, project, positions {vector.positions}"


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


def box(page, name, css):
    return page.find_element(BY, f".vector[data-name={name}] {css}")


def sent(page):
    return page.execute_script("return steering()")


def test_layers_and_positions_of_a_vector_are_set_and_sent(page, server):
    switch(page, "uppercase")
    assert sent(page) == [{"name": "uppercase", "strength": 1}]
    fill(page, ".vector[data-name=uppercase] [type=text]", "5, 3,3")
    box(page, "uppercase", "select option[value=generation]").click()
    expected = {"name": "uppercase", "strength": 1, "layer": [3, 5], "positions": "generation"}
    assert sent(page) == [expected]
    page.execute_script("return load()")  # as after an upload
    assert sent(page) == [expected]
    for wrong in ("a", "1-3", "", "1,,2"):
        fill(page, ".vector[data-name=uppercase] [type=text]", wrong)
        fill(page, "#question", QUESTION)
        page.find_element(BY, "#send").click()
        wait(lambda: "write numbers" in page.find_element(BY, "#trouble").text)
        assert page.find_element(BY, "#question").get_attribute("value") == QUESTION
    fill(page, ".vector[data-name=uppercase] [type=text]", "99")
    ask(page)
    assert "out of range" in page.find_element(BY, ".reply.steered .error").text


def test_the_command_and_the_request_do_the_same(page, server):
    import shlex

    switch(page, "json")
    set_slider(page, "json", 0.75)
    fill(page, ".vector[data-name=json] [type=text]", "3")
    fill(page, "#question", "What's a 'fox'?")
    page.find_element(BY, "#same summary").click()
    wait(lambda: page.find_element(BY, "#command").text)
    command = shlex.split(page.find_element(BY, "#command").text)
    assert command[:2] == ["localsteer", "run"] and command[-1] == "What's a 'fox'?"
    assert command[2:6] == ["-m", "bundled", "-s", "json.gguf:0.75@3"]
    request = shlex.split(page.find_element(BY, "#curl").text)
    assert request[:2] == ["curl", f"{server.url}/v1/chat/completions"]
    body = json.loads(request[-1])
    assert body["steering"] == [{"name": "json", "strength": 0.75, "layer": [3]}]
    with server.http() as client:
        assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_chats_are_kept_in_the_browser(page, server):
    page.execute_script("localStorage.clear()")
    switch(page, "uppercase")
    ask(page, "Tell me about <b>foxes</b>.")
    before = texts(page, "plain"), texts(page, "steered")
    page.find_element(BY, "#clear").click()
    ask(page, "What is a river?")
    page.get(server.url)
    names = [each.text for each in page.find_elements(BY, "#saved option")]
    assert names == ["Saved chats", "What is a river?", "Tell me about <b>foxes</b>."]
    page.find_elements(BY, "#saved option")[2].click()
    assert (texts(page, "plain"), texts(page, "steered")) == before
    assert [each.text for each in page.find_elements(BY, ".question")] == ["Tell me about <b>foxes</b>."]
    assert page.execute_script("return histories.steered.at(-1).content") == before[1][0]
    wait(lambda: page.find_elements(BY, ".vector"))
    ask(page, "And rivers?")  # it goes on
    assert page.execute_script("return savedChats()[0].turns.length") == 2
    page.find_element(BY, "#forget").click()
    assert not page.find_elements(BY, ".turn") and len(page.find_elements(BY, "#saved option")) == 2
    for damaged in ("{", "7", '[7, {"turns": 7}]'):
        page.execute_script("localStorage.setItem('localsteer.chats', arguments[0])", damaged)
        page.get(server.url)
        wait(lambda: page.find_elements(BY, ".vector"))
        assert len(page.find_elements(BY, "#saved option")) == 1
    page.execute_script("localStorage.clear()")


def test_everything_has_a_name_and_escape_stops_a_reply(page):
    """The accessible names that Chromium computes, of all that can be reached by the keyboard."""
    page.find_element(BY, "#same summary").click()
    fields = page.find_elements(BY, "input, select, textarea, button, summary, [tabindex]")
    nameless = [
        each.get_attribute("outerHTML")[:80]
        for each in fields
        if each.is_displayed() and not each.accessible_name
    ]
    assert len(fields) > 15 and nameless == []
    page.execute_script(
        "events = async function* () { yield { choices: [{ delta: { content: 'old' } }] };"
        " await new Promise((_, stop) => stopping.signal.addEventListener('abort', () =>"
        " stop(new DOMException('', 'AbortError')))); }"
    )
    fill(page, "#question", QUESTION)
    page.find_element(BY, "#send").click()
    wait(lambda: texts(page, "plain") == ["old"])
    assert page.find_element(BY, ".reply").get_attribute("aria-busy") == "true"
    assert "Escape" in page.find_element(BY, "#said").text
    page.find_element(BY, "body").send_keys("\ue00c")
    wait(lambda: page.find_element(BY, ".reply").get_attribute("aria-busy") == "false")
    assert page.find_element(BY, ".reply .error").text == "stopped"


ENTER, SPACE, TAB = "\ue007", " ", "\ue004"


def test_the_focus_stays_in_reach_by_the_keyboard(page):
    """Nothing that is hidden or switched off while it has the focus drops it to the top of the page."""
    page.execute_script("localStorage.clear()")
    fill(page, "#question", QUESTION)
    page.find_element(BY, "#question").send_keys(TAB)
    assert focused(page) == "send"
    page.execute_script(
        "events = async function* () { yield { choices: [{ delta: { content: 'old' } }] };"
        " await new Promise((_, stop) => stopping.signal.addEventListener('abort', () =>"
        " stop(new DOMException('', 'AbortError')))); }"
    )
    page.switch_to.active_element.send_keys(SPACE)
    wait(lambda: texts(page, "plain") == ["old"])
    assert focused(page) == "stop"
    page.switch_to.active_element.send_keys(ENTER)
    wait(lambda: page.find_element(BY, "body").get_attribute("data-busy") == "false")
    assert focused(page) == "question"
    page.execute_script("document.getElementById('forget').focus()")
    page.switch_to.active_element.send_keys(SPACE)
    assert not page.find_elements(BY, ".turn") and focused(page) == "saved"


def test_the_projection_is_there_in_numbers_and_is_not_read_out(page):
    switch(page, "uppercase")
    ask(page)
    assert page.find_element(BY, ".projection").get_attribute("aria-live") == "off"
    summary = page.find_element(BY, ".projection summary")
    summary.send_keys(ENTER)
    region = page.find_element(BY, ".projection [role=region]")
    wait(region.is_displayed)
    rows = region.find_elements(BY, "tbody tr")
    assert len(rows) == len(page.find_elements(BY, ".projection .token"))
    shares = [row.find_elements(BY, "td")[0].text for row in rows]
    titles = [token.get_attribute("title") for token in page.find_elements(BY, ".projection .token")]
    assert [title.split()[0] for title in titles if title] == [share for share in shares if share]


def choose(page, name):
    page.find_element(BY, f"#catalogue option[value='{name}']").click()


def focused(page):
    return page.execute_script("return document.activeElement.id")


def test_one_click_from_a_sentence_to_a_vector_that_is_tried(page, server):
    """By the keyboard: the focus goes to what can be done next, and what is announced is in a live region."""
    fill(page, "#question", "Tell me about the zorrel.")
    fill(page, "#sentence", "Answer in capital letters.")
    page.find_element(BY, "#sentence").send_keys("\ue007")  # Enter
    wait(lambda: page.find_element(BY, "#job").is_displayed())
    assert focused(page) == "job-stop"
    said = page.find_element(BY, "#job-said")
    assert said.get_attribute("role") == "status" and "has begun" in said.get_attribute("textContent")
    name = "answer_in_capital_letters"
    assert "“Answer in capital letters.” on bundled" in page.find_element(BY, "#job-title").text
    wait(lambda: page.find_element(BY, "#job-now").text.endswith(" s"))
    page.get(server.url)  # whoever comes back sees it again
    wait(lambda: page.find_element(BY, "#job").is_displayed())
    fill(page, "#temperature", "0")
    set_slider(page, "json", 0.5)
    slider = page.find_element(BY, ".vector[data-name=json] [type=range]")
    fill(page, "#question", "Tell me about the zorrel.")
    page.execute_script("document.getElementById('job-stop').focus()")
    wait(lambda: page.find_element(BY, "#outcome").is_displayed(), PATIENT)
    assert focused(page) == "outcome-title"
    assert page.find_element(BY, "#outcome-title").text == f"{name} is ready"
    assert [row.text.split()[0] for row in page.find_elements(BY, "#outcome tbody tr")[1:]] == [
        "plain", "told", "steered", "told",
    ]  # fmt: skip
    words = page.find_element(BY, "#outcome-text").text
    assert "of 8" in words and "strength" in words and f"-o '{name}.gguf'" in words
    said = page.find_element(BY, "#job-said").get_attribute("textContent")
    assert name in said and "of 8" in said
    settings = localsteer_settings(server, name)
    assert page.find_element(BY, f".vector[data-name={name}] [role=switch]").is_selected()
    wait(lambda: texts(page, "steered") and texts(page, "plain"), PATIENT)
    wait(lambda: page.find_element(BY, "body").get_attribute("data-busy") == "false", PATIENT)
    assert page.find_element(BY, ".question").text == "Tell me about the zorrel."
    assert sent(page) == [{"name": name, "strength": settings["strength"]}]
    assert is_loud(texts(page, "steered")[0]) and not is_loud(texts(page, "plain")[0])
    assert slider.get_attribute("value") == "0.5"  # the other boxes stay as they were
    with server.http() as http:
        http.delete(f"/v1/steering/{name}")


PATIENT = 300.0  # the search has the lowest priority


def localsteer_settings(server, name):
    with server.http() as http:
        return http.get(f"/v1/steering/{name}").json()["settings"]


def test_a_search_is_stopped_and_what_is_wrong_is_said(page, server):
    page.find_element(BY, "#begin").click()
    wait(lambda: "Answer in rhyme" in page.find_element(BY, "#trouble").text)
    assert focused(page) == "sentence"
    fill(page, "#sentence", "rhyme")
    page.find_element(BY, "#begin").click()
    wait(lambda: "more than one word" in page.find_element(BY, "#trouble").text)
    choose(page, "title")
    assert not page.find_element(BY, "#sentence").is_displayed()
    page.find_element(BY, "#begin").click()
    stop = page.find_element(BY, "#job-stop")
    wait(stop.is_displayed)
    stop.click()
    wait(lambda: stop.text == "Stop at once" or not stop.is_displayed())
    if stop.is_displayed():
        stop.click()
    wait(lambda: page.find_element(BY, "#outcome").is_displayed(), PATIENT)
    assert "Stopped" in page.find_element(BY, "#outcome-title").text
    assert page.find_element(BY, "#begin").is_enabled()
    assert not page.find_element(BY, "#outcome-try").is_displayed()


def test_a_vector_that_is_there_is_used_at_once(page):
    choose(page, "uppercase")
    assert page.find_element(BY, "#begin").text == "Use it"
    page.find_element(BY, "#begin").click()
    wait(lambda: texts(page, "steered"))
    wait(lambda: page.find_element(BY, "body").get_attribute("data-busy") == "false")
    assert is_loud(texts(page, "steered")[0])


def test_where_nothing_helps_the_page_says_so_and_what_learning_would_do(browser, tiny_llama, tmp_path):
    """On a model of random weights, which never follows."""
    with serving(tmp_path, models={"tiny": tiny_llama.gguf_path}) as server:
        browser.get(server.url)
        wait(lambda: browser.find_elements(BY, "#catalogue option[value=title]"))
        choose(browser, "title")
        browser.find_element(BY, "#begin").click()
        wait(lambda: browser.find_element(BY, "#outcome").is_displayed(), PATIENT)
        words = browser.find_element(BY, "#outcome").text
        assert "nothing was added" in words and "none of 24 replies" in words
        assert "Learning does not need a model that does what it is told" in words
        can_learn = browser.find_element(BY, "#how").is_displayed()
        assert browser.find_element(BY, "#outcome-learn").is_displayed() == can_learn
        assert not browser.find_element(BY, "#outcome-try").is_displayed()
        assert not browser.find_elements(BY, ".vector") and not list(tmp_path.iterdir())


CONTRAST = """
const channels = (text) => text.match(/[0-9.]+/g).slice(0, 3).map((each) => {
  const share = each / 255;
  return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
});
const light = (text) => { const [r, g, b] = channels(text); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const ground = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (colour !== "rgba(0, 0, 0, 0)") return colour;
  }
  return "rgb(255, 255, 255)";
};
return [...document.querySelectorAll("h1, h2, p, label, legend, button, summary, select, td, th, caption")]
  .filter((node) => node.offsetParent && node.textContent.trim())
  .map((node) => {
    const [a, b] = [light(getComputedStyle(node).color), light(ground(node))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), node.outerHTML.slice(0, 80)];
  }).filter(([ratio]) => ratio < 4.5);
"""


# of switches and fields against what is behind them, which tells where they are (WCAG 1.4.11)
EDGES = (
    CONTRAST.replace(
        '"h1, h2, p, label, legend, button, summary, select, td, th, caption"',
        ('"[role=switch]:not(:checked), select, textarea, button, input[type=text], input[type=number]"'),
    )
    .replace("&& node.textContent.trim()", "")
    .replace("ratio < 4.5", "ratio < 3")
    .replace(
        "light(getComputedStyle(node).color), light(ground(node))",
        "light(getComputedStyle(node)[node.type === 'checkbox' ? 'backgroundColor' : 'borderTopColor']),"
        " light(ground(node.parentElement))",
    )
)


def test_nothing_moves_where_less_motion_is_wanted(page):
    moves = "return getComputedStyle(document.getElementById('compare')).transitionDuration"
    assert page.execute_script(moves) == "0.15s"
    media = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    try:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        assert page.execute_script(moves) == "0s"
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_and_dark_mode(page, scheme):
    """320 px, which is a page of 1280 px at 400%: nothing is to be scrolled sideways, and all can be read."""
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    size = {"width": 320, "height": 640, "deviceScaleFactor": 1, "mobile": False}
    try:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        switch(page, "json")
        ask(page)
        job = {"status": "running", "method": "search", "instruction": "x", "model": "m", "seconds": 1}
        page.execute_script("showJob(arguments[0]); by('job').hidden = false", job)
        width = page.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
        assert width[0] == 320 and width[1] <= 320
        assert page.execute_script(CONTRAST) == []
        assert page.execute_script(EDGES) == []
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_server_that_makes_none_says_why(browser):
    with serving(None) as server:
        browser.get(server.url)
        wait(lambda: browser.find_element(BY, "#make-off").text)
        assert "--vectors DIR" in browser.find_element(BY, "#make-off").text
        fill(browser, "#sentence", "Answer in rhyme.")
        browser.find_element(BY, "#begin").click()
        wait(lambda: "--vectors DIR" in browser.find_element(BY, "#trouble").text)


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
    for name in ("index.html", "page.css", "make.js", "page.js", "docs.html", "docs.js"):
        assert len(folder.joinpath(name).read_bytes()) > 100
