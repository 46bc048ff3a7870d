"""`localsteer trace`: strip, picture and page show what the numbers say, and bad input is refused."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from cli_runs import invoke, write_vector

from localsteer import ControlVector, bundled
from localsteer.trace import Line, Trace
from localsteer.trace.html import render
from localsteer.trace.plot import draw_trace
from localsteer.trace.terminal import print_trace

NAN = float("nan")
FEW = ("-t", "1", "-n", "8")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def vector(folder):
    return write_vector(folder / "strong.gguf")


@pytest.fixture
def drawn() -> Trace:
    """Four tokens by hand: two of prompt, one of reply, and the one that ends it."""
    means = {"mean_with": np.array([10.0, 8.0]), "mean_without": np.array([-10.0, 0.0])}
    vector = ControlVector(
        np.eye(2), **means, std_with=np.ones(2), std_without=np.ones(2), layers=(0,), positions="prompt",
        name="json",
    )  # fmt: skip
    steered = Line(
        vector, 0, np.array([-5, -10, 1, NAN]), np.array([-5, -10, 1, NAN]), np.array([10, 10, 1, NAN]),
        np.array([10, 10, NAN, NAN]), np.array([15.0, 20, 0, NAN]),
    )  # fmt: skip
    watched = Line(
        vector, 1, np.array([0, 0, 4.0, NAN]), np.array([8, 6, 4.5, NAN]), np.array([8, 6, 4.5, NAN]),
        np.full(4, NAN), np.array([0.0, 0, 0, NAN]),
    )  # fmt: skip
    effect = np.array([NAN, NAN, 2.5, 0.0])
    return Trace(
        model="small.gguf", n_prompt=2, tokens=(5, 6, 7, 2), pieces=("<u>", " fox\n", "{", "</s>"), reply="{",
        finish_reason="stop", vectors=(vector,), lines=(steered, watched), effect=effect,
        effect_here=np.stack([effect, np.array([NAN, NAN, 0.1, 0.0])]),
        plain_tokens=np.array([-1, -1, 9, 2]), steered_tokens=np.array([-1, -1, 7, 2]),
        plain_pieces=("", "", "A", "</s>"),
    )  # fmt: skip


def transcript(trace: Trace, **options) -> str:
    from rich.console import Console

    file = io.StringIO()
    print_trace(trace, Console(file=file, width=110, highlight=False, markup=False, **options))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


STRIP = """\
json at layer 0: project, positions prompt, strength 1; -10 without the instruction, 10 with it
           <u> ·fox⏎│     { </s>
before   -5.00 -10.0│  1.00    ·
after     10.0  10.0│  1.00    ·
weight    15.0  20.0│     ·    ·
effect       ·     ·│  2.50 0.00
instead      ·     ·│     A    ·

"""
MAPS = """\
json, projections, steered: 0 as without the instruction, 1 as with it
layer  <u>  ·fox    {
    1  1.0   0.8   0.6
    0[ 1.0][ 1.0]  0.6

json, steered less plain: what becomes of the change
layer  <u>  ·fox    {
    1  1.0   0.8   0.1
    0[ 0.8][ 1.0]  0.0

json, effect in nats if it steered at this layer
layer   {   </s>
    1  0.1   0.0
    0  2.5   0.0

"""
LEGEND = (
    "projections:  as without the instruction  between  as with it  · effect: nats between what the steered "
    "and the plain model say there · instead: what the plain model would rather say\n"
    "acts: steering changes what is said: at 1 of 2 tokens the plain model would say something else. "
    "Largest\neffect: 2.5 nats at '{'; 90% of it all by token 1 of the reply."
)


def test_the_whole_of_it_in_a_pipe(drawn):
    assert transcript(drawn) == STRIP + MAPS + LEGEND


def test_a_terminal_gets_the_scale_in_colours(drawn):
    shown = transcript(drawn, force_terminal=True, color_system="truecolor")
    assert "48;2;36;30;78m -10.0" in shown  # dark: as without the instruction
    assert "48;2;252;232;120m  10.0" in shown  # light: as with it


def test_long_replies_are_cut_into_lines_that_fit(tiny_llama, vector, monkeypatch):
    from localsteer.cli import console

    monkeypatch.setenv("COLUMNS", "60")
    console._consoles.cache_clear()
    try:
        done = invoke("trace", "-m", tiny_llama.gguf_path, "-s", vector, "-t", "1", "-n", "30", "Foxes")
    finally:
        console._consoles.cache_clear()
    rows = [line for line in done.out.splitlines() if line.startswith(("before", "after", "weight"))]
    assert len(rows) >= 9 and max(map(len, rows)) <= 60


def test_the_page_is_one_file_that_needs_nothing_else(drawn):
    page = render(drawn)
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert not re.search(r"<script|<link|https?:|@import|url\(", page)
    assert "&lt;u&gt;" in page and "<u>" not in page  # what a model says is text, not markup
    assert page.count('class="token') == 1 + 4 and 'class="token first"' in page
    assert "before -10, after 10, target 10, weight 20" in page
    assert page.count("<table>") == 3 and page.count('class="on"') == 4
    assert '<p class="finding acts">' in page


def test_the_picture_holds_strips_and_maps(drawn, folder):
    pytest.importorskip("matplotlib")
    draw_trace(drawn, folder / "a.png")
    assert (folder / "a.png").read_bytes().startswith(PNG)
    draw_trace(drawn, folder / "a.svg")
    picture = (folder / "a.svg").read_text("utf-8")  # texts are outlines there, and comments beside them
    for words in (
        "json at layer 0",
        "weight",
        "steered less plain",
        "effect in nats if it steered",
        "acts: ",
    ):
        assert words in picture


def test_dollar_signs_in_tokens_are_no_formula(drawn, folder):
    pytest.importorskip("matplotlib")
    from dataclasses import replace

    draw_trace(
        replace(drawn, pieces=("$x$", "$", "\\frac{", "$$"), plain_pieces=("", "", "$a_$", "")), "b.png"
    )
    assert Path("b.png").exists()


def test_pictures_are_talk_and_the_strip_is_the_answer(tiny_llama, vector):
    pytest.importorskip("matplotlib")
    model = tiny_llama.gguf_path
    done = invoke("trace", "-m", model, "-s", vector, *FEW, "--plot", "a.png", "--html", "a.html", "Foxes")
    assert done.status == 0, done.err
    assert done.err == "localsteer: drew a.png\nlocalsteer: wrote a.html\n"
    assert done.out.startswith("strong at layer 2: project, positions all, strength 1; 0 without")
    assert Path("a.png").read_bytes().startswith(PNG)
    assert "strong at layer 2" in Path("a.html").read_text("utf-8")


def test_the_document_holds_every_token(tiny_llama, vector):
    model = tiny_llama.gguf_path
    done = invoke("trace", "-m", model, "-s", f"{vector}:0.5@1", *FEW, "--watch", "0-1", "--json", "Foxes")
    document = done.json
    assert (done.err, document["prompt"], len(document["tokens"])) == ("", "Foxes", document["n_prompt"] + 8)
    assert [(line["layer"], line["steered"], line["strength"]) for line in document["lines"]] == [
        (0, False, 0.5), (1, True, 0.5),
    ]  # fmt: skip
    line = document["lines"][1]
    np.testing.assert_allclose(line["target"], [p + 0.5 * (30 - p) for p in line["before"]], rtol=1e-6)
    np.testing.assert_allclose(line["after"], line["target"], rtol=1e-4, atol=1e-4)
    reply = invoke("run", "-m", model, "-s", f"{vector}:0.5@1", *FEW, "--temp", "0", "--json", "Foxes").json
    assert document["reply"] == reply["reply"]


def test_a_given_reply_and_a_system_message(tiny_llama, vector):
    options = ("--reply", "a red fox", "--system", "Be brief.", "--json")
    document = invoke("trace", "-m", tiny_llama.gguf_path, "-s", vector, *FEW, *options, "Foxes").json
    assert (document["reply"], document["finish_reason"]) == ("a red fox", "given")
    assert document["prompt"][0] == {"role": "system", "content": "Be brief."}


def test_an_instruction_of_the_catalogue_is_traced_at_once():
    if not bundled.is_available():
        pytest.skip("this copy of the package holds no bundled model")
    done = invoke(
        "trace", "-i", "json", "-t", "1", "--layer", "2", "--positions", "all", "Tell me about foxes."
    )
    assert done.status == 0, done.err
    assert "\nlocked: the reply is locked" in done.out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["Foxes"], "there is nothing to trace: add -s VECTOR or --instruction."),
        (["-s", "none.gguf", "Foxes"], "none.gguf"),
        (["-s", "strong.gguf", ""], "the prompt is empty"),
        (["-s", "strong.gguf", "--raw", ""], "the prompt is empty"),
        (["-s", "strong.gguf", "--watch", "some", "Foxes"], "'some' is not a layer"),
        (["-s", "strong.gguf", "--watch", "4", "Foxes"], "layer 4 is out of range"),
        (["-s", "strong.gguf@9", "Foxes"], "layer 9 is out of range"),
        (["-s", "strong.gguf", "--plot", "none/a.png", "Foxes"], "there is no folder none"),
        (["-s", "strong.gguf", "--html", "none/a.html", "Foxes"], "there is no folder none"),
        (["-s", "strong.gguf", "--html", "strong.gguf", "Foxes"], "does not end in .html"),
        (["-s", "strong.gguf", "--plot", "a.docx", "Foxes"], "a.docx can't be drawn"),
        (["-s", "strong.gguf", "--temp", "nan", "Foxes"], "temp must be a finite number"),
        (["-s", "strong.gguf", "-n", "-2", "Foxes"], "-2 is not in the range"),
        (["-s", "strong.gguf", "-s", "strong.gguf", "Foxes"], "nearly parallel"),
        (["-s", "strong.gguf", "-c", "8", "--reply", "fox " * 40, "Foxes"], "more than the context of 8"),
        (["-s", "wide.gguf", "Foxes"], "embedding width"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(tiny_llama, vector, folder, args, says):
    write_vector(folder / "wide.gguf", n_embd=32)
    assert says in invoke("trace", "-m", tiny_llama.gguf_path, *FEW, *args).complaint()
