"""Chat templates that were written to do harm: one line, within seconds, and nothing is left running."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from localsteer import rendering, templates
from localsteer.errors import LocalsteerError, ModelFileError, PromptError
from localsteer.rendering import RENDERER, RenderingFailed
from localsteer.templates import ChatTemplate

SAID = [{"role": "user", "content": "Foxes <hunt> & \ud83e\udd8a 狐"}]
PLAIN = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HUGE = {
    "product": "{{ 'a' * 10**10 }}",
    "list": "{{ [0] * 10**10 }}",
    "doubling": "{% set x = namespace(s='a') %}{% for i in range(60) %}{% set x.s = x.s ~ x.s %}{% endfor %}",
    "width of format": "{{ '%1000000000d' % 1 }}",
    "width of str.format": "{{ '{:>999999999}'.format(1) }}",
    "center": "{{ 'a' | center(10**9) }}",
    "replace": "{{ ('a' * 10**5) | replace('a', 'b' * 10**5) }}",
    "indent": "{{ ('x\\n' * 10**4) | indent(10**6) }}",
    "join": "{{ range(99999) | join('a' * 10**5) }}",
    "just too long": "{{ 'a' * 5000000 }}",
    "power": "{{ 2 ** (10 ** 12) }}",
    "macros": "{% macro a() %}{{ a() }}{{ a() }}{% endmacro %}{{ a() }}",
    "loop that calls itself": "{% for i in [1] recursive %}{{ loop([1, 2]) }}{% endfor %}",
}


@pytest.fixture(autouse=True)
def shorter(monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 1.5)
    RENDERER.forget()


@pytest.mark.parametrize("name", HUGE)
def test_what_would_take_all_memory_or_time_is_one_line_instead(name):
    start = time.monotonic()
    with pytest.raises(PromptError, match="chat template") as refusal:
        ChatTemplate(HUGE[name]).render(SAID)
    assert time.monotonic() - start < 20
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 300
    assert ChatTemplate(PLAIN).render(SAID) == f"[{SAID[0]['content']}]"


def test_loops_that_never_end_are_killed():
    with pytest.raises(PromptError, match=r"more than 1\.5 seconds"):
        ChatTemplate(ENDLESS).render(SAID)
    assert RENDERER.usual._child is None


def test_nothing_of_the_current_folder_is_run(tmp_path, monkeypatch):
    for name in ("json", "jinja2", "localsteer"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    RENDERER.close()
    assert ChatTemplate(PLAIN).render(SAID) == f"[{SAID[0]['content']}]"


def test_what_a_template_says_can_not_control_a_terminal():
    with pytest.raises(PromptError, match="no \ufffd\\[31mwords"):
        ChatTemplate("{{ raise_exception('no \x1b[31mwords') }}").render(SAID)


def test_a_template_that_never_ends_is_run_once_and_not_again_for_a_while(monkeypatch):
    template = ChatTemplate(ENDLESS)
    start = time.monotonic()
    assert template.keeps_words  # a raw prompt needs no template
    for _ in range(20):
        with pytest.raises(PromptError, match="more than"):
            template.render(SAID)
    assert time.monotonic() - start < 2 * rendering.SECONDS
    monkeypatch.setattr(templates, "RETRY_SECONDS", 0.0)
    template._put_off(PromptError("earlier"))
    with pytest.raises(PromptError, match="more than"):
        template.render(SAID)


def test_a_template_that_had_to_wait_is_not_taken_for_one_that_reads_parts():
    template = ChatTemplate(PLAIN)
    with RENDERER.usual.turn(), pytest.raises(PromptError, match="keep it busy"):
        template.render(SAID)
    assert not template.reads_parts
    assert template.render(SAID) == f"[{SAID[0]['content']}]"


def test_a_template_that_takes_for_ever_to_read_is_the_model_files_fault():
    with pytest.raises(ModelFileError, match="can't be read"):
        ChatTemplate("{{" + "(" * 100_000).render(SAID)


def test_whoever_waits_for_a_bad_template_gets_an_answer_too():
    outcomes = []

    def render(template):
        try:
            outcomes.append(ChatTemplate(template).render(SAID))
        except LocalsteerError as error:
            outcomes.append(type(error))

    threads = [threading.Thread(target=render, args=(text,)) for text in [ENDLESS] * 3 + [PLAIN] * 3]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert time.monotonic() - start < 30
    assert len(outcomes) == 6 and outcomes.count(PromptError) >= 3
    assert ChatTemplate(PLAIN).render(SAID)


def test_a_template_that_was_stopped_holds_up_no_other(monkeypatch):
    """It does so once. After that the others don't wait for it, nor may its own prompts queue without end."""
    values = {"messages": SAID}
    outcomes = []

    def render():
        try:
            RENDERER.render(ENDLESS, values)
        except RenderingFailed as error:
            outcomes.append("stopped" if error.was_run else "busy")

    render()
    RENDERER.render(PLAIN, values)  # the process that was ended is started again
    threads = [threading.Thread(target=render) for _ in range(6)]
    for thread in threads:
        thread.start()
    meanwhile = 0
    while any(thread.is_alive() for thread in threads):
        RENDERER.render(PLAIN, values)
        meanwhile += 1
    assert meanwhile > 10
    assert sorted(outcomes) == ["busy"] * 4 + ["stopped"] * 3
    monkeypatch.setattr(rendering, "APART_SECONDS", 0.0)
    RENDERER.forget()
    render()
    assert RENDERER._lane(ENDLESS) is RENDERER.usual


def test_many_threads_each_get_their_own_prompt():
    rendered = {}

    def render(n):
        for _ in range(20):
            rendered.setdefault(n, set()).add(
                ChatTemplate(PLAIN).render([{"role": "user", "content": f"{n}"}])
            )

    threads = [threading.Thread(target=render, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rendered == {n: {f"[{n}]"} for n in range(8)}


def test_a_child_that_dies_is_started_again():
    assert ChatTemplate(PLAIN).render(SAID)
    RENDERER.usual._child.kill()
    RENDERER.usual._child.wait()
    assert ChatTemplate(PLAIN).render(SAID) == f"[{SAID[0]['content']}]"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_the_child_goes_when_the_program_is_killed():
    code = (
        "import os, signal\nfrom localsteer.templates import ChatTemplate\n"
        f"from localsteer.rendering import RENDERER\nChatTemplate('x').render({SAID!a})\n"
        "print(RENDERER.usual._child.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(done.stdout)
    ends = time.monotonic() + 10
    while time.monotonic() < ends and _is_running(pid):
        time.sleep(0.05)
    assert not _is_running(pid)


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
