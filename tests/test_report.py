"""localsteer.evaluate.report: what results.json holds, as a person reads it."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import report_cases
from report_cases import CONDITIONS, FOREIGN, FORMATS, HOSTILE, LONG
from rich.console import Console

from localsteer.errors import LocalsteerError
from localsteer.evaluate import report
from localsteer.evaluate.page import Applied, Share, loaded
from localsteer.evaluate.report import figures, markdown, plots
from localsteer.evaluate.report.document import document, settings_text
from localsteer.evaluate.report.figures import TableCell, cell, interval, number, percent, ratio

VOID = {"meta", "br", "img", "link"}
SHOWN_HOSTILE = HOSTILE.replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")


@pytest.fixture(scope="module")
def results():
    return json.loads(json.dumps(report_cases.results()))


@pytest.fixture(scope="module")
def small(results):
    """One suite with a few plots, where it is the writing that is tested: drawing takes a while."""
    return results | {"suites": {"length": results["suites"]["length"]}}


@pytest.fixture(scope="module")
def page(results):
    return Page(report.html.render(results))


class Page(HTMLParser):
    """Checks that tags are balanced, and gathers text, tags, links and ids."""

    def __init__(self, source: str):
        super().__init__()
        self.source, self.open, self.tags, self.ids, self.links = source, [], [], [], []
        self.text: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href", "src", "action", "data", "srcset"):
                self.links.append(value)
            assert not name.startswith("on"), name
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def says(self, text: str) -> bool:
        return text in " ".join("".join(self.text).split())


# --- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.0, "0%"),
        (0.001, "<1%"),
        (0.0051, "1%"),
        (0.954, "95%"),
        (0.999, ">99%"),
        (1, "100%"),
        (None, "-"),
        (float("inf"), "-"),
    ],
)
def test_a_share_is_in_whole_per_cents_and_never_rounded_to_all_or_nothing(share, shown):
    assert percent(share) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.3, "1.3x"),
        (1, "1.0x"),
        (0.83, "0.8x"),
        (0.012, "0.01x"),
        (14.23, "14.2x"),
        (None, "-"),
        (float("nan"), "-"),
    ],
)
def test_a_ratio(value, shown):
    assert ratio(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"), (0.0, "0"), (7, "7"), (12345, "12,345"), (1234.5, "1,234"), (9.64, "9.64"), (10.0, "10.0"),
        (0.5, "0.5"), (0.059, "0.059"), (1e-5, "1.0e-05"), (2.5e12, "2.5e+12"), (-3.14159, "-3.14"),
        (None, "-"), (float("nan"), "-"), (float("inf"), "inf"),
    ],
)  # fmt: skip
def test_a_number_keeps_the_digits_that_count(value, shown):
    assert number(value) == shown


def test_an_interval_is_left_out_where_it_is_not_known():
    assert interval(0.901, 0.98) == "90-98"
    assert interval(-0.052, 0.03) == "-5 to 3"
    assert interval(-0.001, 0.03) == "0 to 3" and percent(-0.001) == "0%"
    assert interval(1.0, 1.0) == ""  # no draw differed: that is no certainty
    assert interval(None, 0.98) == interval(0.9, float("nan")) == ""


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Share(0.95), TableCell("95%", "", 0.95, True)),
        (Share(0.95, 0.9, 0.98), TableCell("95%", "90-98", 0.95, True)),
        (Share(None), TableCell("-", number=True)),
        (None, TableCell("-", number=True)),
        (True, TableCell("yes")),
        (3, TableCell("3", number=True)),
        ("fox", TableCell("fox")),
        ([1, 2.5, None], TableCell("1, 2.5, -")),
    ],
)
def test_a_table_s_cell_may_hold_any_of_these(value, shown):
    assert cell(value) == shown


def test_settings_are_one_short_line():
    def at(*layers):
        return Applied(layer=list(layers), positions="prompt", mode="project", strength=1.0)

    assert settings_text(at(2)) == "layer 2, prompt, project, x1"
    assert settings_text([at(2), at(2, 3)]) == f"{settings_text(at(2))} + layers 2 3, prompt, project, x1"
    assert settings_text([at(il) for il in range(6)]).endswith("and 3 more")
    assert settings_text(None) == settings_text(Applied()) == ""


# --- what is said ------------------------------------------------------------------------------------------


def test_each_suite_has_one_line_for_readers_in_a_hurry(results):
    summary = document(results).suites[0].summary
    assert summary.startswith("85% (81-89) of the steered replies follow, 2% of the unsteered.")
    assert "With the instruction in the prompt 93%, 97% with the vector as well." in summary
    assert "a random direction 3%, another vector 4%." in summary
    assert document(results).suites[0].headline == summary.split(". ")[0] + "."


def test_lifted_instructions_are_those_whose_intervals_lie_apart():
    def row(none, steered):
        return {"none": {"strict": none}, "steered": {"strict": steered}}

    apart = row({"accuracy": 0.1, "low": 0.0, "high": 0.2}, {"accuracy": 0.5, "low": 0.3, "high": 0.7})
    near = row({"accuracy": 0.1, "low": 0.0, "high": 0.4}, {"accuracy": 0.5, "low": 0.3, "high": 0.7})
    suite = {"instructions": {"a": apart, "b": near, "c": {}}, "all": apart}
    made = document({"format": 1, "suites": {"s": suite}}).suites[0]
    assert "Steering lifts 1 of 2 instructions beyond their intervals." in made.summary


def test_a_suite_s_own_summary_is_kept():
    made = document({"format": 1, "suites": {"s": {"title": "T", "summary": "It works. Mostly."}}}).suites[0]
    assert (made.summary, made.headline) == ("It works. Mostly.", "It works.")


def test_columns_of_which_nothing_is_known_are_left_out(results):
    length = document(results).suites[1]
    assert "follows" not in length.overall.columns and "words" in length.overall.columns
    assert length.instructions is None


def test_figures_that_no_report_has_heard_of_get_a_column(results):
    assert "curl" in document(results).suites[2].details.columns


def test_the_instruction_table_has_every_condition_its_interval_and_where_it_is_steered(results):
    table = document(results).suites[0].instructions
    assert table.columns == ("instruction", *CONDITIONS, "perplexity, steered", "steered at")
    assert [row[0].text for row in table.rows] == [*FORMATS, "all"]
    figure = results["suites"]["format"]["instructions"]["json"]["steered"]
    shown = table.rows[0][1 + CONDITIONS.index("steered")]
    assert shown.text == percent(figure["strict"]["accuracy"])
    assert shown.minor == interval(figure["strict"]["low"], figure["strict"]["high"])
    assert table.rows[0][-2].text == ratio(figure["quality"]["perplexity_ratio"])
    assert table.rows[0][-1].text == settings_text(Applied(**figure["settings"]))


def test_sections_alone_are_a_report_too():
    section = {
        "title": "What changed",
        "text": "Little.",
        "tables": [{"columns": ["a"], "rows": [[{"share": 0.5}]]}],
    }
    results = {"format": 1, "title": "Run a and run b", "sections": [section]}
    assert Page(report.html.render(results)).says("What changed")
    assert "| 50% |" in report.markdown.render(results)
    assert "Run a and run b" in terminal(results) and "50%" in terminal(results)


def test_a_plot_of_nothing_is_left_out(results):
    titles = [plot.title for plot in markdown.all_plots(document(results))]
    assert "Mean words" in titles
    assert not {"empty", "gaps", "no cells"} & set(titles)


# --- HTML --------------------------------------------------------------------------------------------------


def test_the_page_needs_neither_a_network_nor_a_script(page):
    assert "script" not in page.tags
    assert all(link.startswith(("#", "data:")) for link in page.links), page.links
    for loader in ("@import", "url(http", "url('http", 'url("http'):
        assert loader not in page.source


def test_every_link_inside_the_page_has_its_target(page):
    wanted = {link[1:] for link in page.links if link.startswith("#")}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert wanted and wanted <= set(page.ids)
    assert {"format", "length", "odd"} <= set(page.ids)


def test_hostile_text_is_shown_and_does_nothing(page):
    assert page.says(SHOWN_HOSTILE) and page.says(SHOWN_HOSTILE.replace("`", ""))  # in a table, in prose
    assert "\x1b" not in page.source
    assert page.says(FOREIGN) and page.says(LONG)
    assert "b" not in page.tags and "<script" not in page.source


def test_every_plot_is_drawn_in_the_page_s_own_colours(results, page):
    drawn = re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL)
    assert len(drawn) == len(list(markdown.all_plots(document(results))))
    for each in drawn:
        ElementTree.fromstring(each)
        assert "currentColor" in each or "<text" not in each
        assert not re.search("|".join((plots.INK, plots.LINE, plots.PAPER)), each)


def test_the_style_is_light_dark_and_fit_for_print(page):
    for rule in ("prefers-color-scheme: dark", "@media print", "position: sticky"):
        assert rule in page.source


def test_all_that_a_run_can_be_repeated_from_is_in_it(results, page):
    for text in (
        results["command"],
        results["machine"],
        results["model"]["sha256"],
        results["files"]["catalog"],
    ):
        assert page.says(text)
    assert page.says(results["vectors"]["json"]["sha256"][:12])
    assert page.tags.count("details") >= 3


def test_a_report_is_the_same_each_time(results, page):
    assert report.html.render(results) == page.source


# --- Markdown ----------------------------------------------------------------------------------------------


def test_the_tables_of_the_markdown_are_whole(results):
    layer: list[int] = []
    layers = []
    for line in [*report.markdown.render(results).splitlines(), ""]:
        if line.startswith("|"):
            layer.append(len(re.findall(r"(?<!\\)\|", line)))
        elif layer:
            layers.append(layer)
            layer = []
    assert len(layers) > 8
    assert all(len(set(widths)) == 1 and len(widths) >= 2 for widths in layers)


def test_markdown_shows_hostile_text_as_it_is(results):
    text = report.markdown.render(results)
    assert "<script" not in text and "<b>" not in text
    assert r"\[f\](javascript:g)" in text and r"\*c\*" in text and r"\$d\$" in text and r"\|" in text
    assert "a_b" in text and r"\_underscored" in text
    assert "\n# " + FOREIGN not in text and "\\# " + FOREIGN in text


def test_names_between_backticks_are_set_apart_in_prose():
    section = {"title": "The control `other`", "text": "`both` minus `<instructed>` | x"}
    results = {"format": 1, "sections": [section]}
    assert "The control <code>other</code>" in report.html.render(results)
    assert "<code>both</code> minus <code>&lt;instructed&gt;</code> | x" in report.html.render(results)
    assert "`both` minus `<instructed>` \\| x" in report.markdown.render(results)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("# x", r"\# x"), ("- x", r"\- x"), ("3. x", r"3\. x"), ("12.5 words", "12.5 words"),
        ("> x", "&gt; x"), ("a - b", "a - b"),
    ],
)  # fmt: skip
def test_a_paragraph_is_no_list_or_heading(text, shown):
    assert markdown.prose(text) == shown


def test_markdown_without_pictures_says_so(results):
    text = report.markdown.render(results)
    assert "![" not in text and "matplotlib" in text


# --- the terminal ------------------------------------------------------------------------------------------


def terminal(results, width=120):
    stream = StringIO()
    report.terminal.print_report(results, Console(file=stream, width=width, markup=False, highlight=False))
    return stream.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_nothing_is_wider_than_the_terminal(results, width):
    assert max(len(line) for line in terminal(results, width).splitlines()) <= width


def test_a_table_that_is_too_wide_is_continued_below(results):
    text = terminal(results, 60)
    for condition in CONDITIONS:
        assert condition in text
    assert text.count("lowercase ") >= 3  # the first column begins every part


def test_the_terminal_gets_no_control_characters(results):
    text = terminal(results)
    assert "\x1b" not in text
    assert "\ufffd[31mred" in text


def test_the_terminal_shows_every_instruction_with_its_interval(results):
    lines = terminal(results).splitlines()
    for name in FORMATS:
        assert any(re.match(rf"{name} .*\d%( \d+-\d+)? ", line) for line in lines), name


def test_the_terminal_shows_heat_maps_that_fit(results):
    lines = terminal(results).splitlines()
    value = results["suites"]["length"]["sections"][1]["plots"][0]["values"][1][2]["share"]
    assert any(re.match(rf"\s*layer 1 .* {value:.0%} ", line) for line in lines)
    assert "plots in the report: Mean words; Follows" in lines
    narrow = " ".join(" ".join(terminal(results, 30).split()).split("plots in the report: ")[2:3])
    assert narrow.startswith("5 layers; 3 layers")


# --- plots -------------------------------------------------------------------------------------------------


def figure_of(kind: str, title: str, **data: Any):
    return plots.figure(typed(report_cases.plot(kind, title, **data)))


def typed(plot: dict[str, Any]):
    return loaded({"format": 1, "sections": [{"plots": [plot]}]}).sections[0].plots[0]


def test_lines_have_a_gap_where_nothing_is_known():
    made = figure_of("lines", "t", x=[-1, 0, 2.5], series={"a": [1, None, 3], "b": [1, 2, 3]})
    first, second = made.axes[0].lines
    assert list(first.get_xdata()) == [-1, 0, 2.5]
    assert [str(value) for value in first.get_ydata()] == ["1.0", "nan", "3.0"]
    assert list(second.get_ydata()) == [1, 2, 3]
    assert first.get_color() != second.get_color()


@pytest.mark.parametrize("kind", ["lines", "bars"])
def test_the_legend_does_not_lie_on_the_title(kind):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    series = {f"one of the series {i}": [0.0, 1.0] for i in range(8)}
    made = figure_of(kind, "All three hold at once", x=["a", "b"], series=series)
    FigureCanvasAgg(made).draw()
    titles = [axes.get_title(loc="left") and axes._left_title for axes in made.axes]
    (title,) = (each.get_window_extent() for each in [*titles, made._suptitle] if each)
    assert not title.overlaps(made.legends[0].get_window_extent())


def test_a_line_that_others_lie_on_is_wider():
    series = {"a": [1.0, 1.0, 0.5], "b": [1.0, 1.0, 1.0], "c": [0.0, 0.2, 0.3]}
    lines = figure_of("lines", "t", x=[0, 1, 2], series=series).axes[0].lines
    assert lines[0].get_linewidth() > lines[1].get_linewidth() == lines[2].get_linewidth()


def test_bars_are_as_long_as_their_values():
    series = {
        "none": [{"share": 0.25, "low": 0.2, "high": 0.4}, None],
        "steered": [{"share": 1.0}, {"share": 0.5}],
    }
    axes = figure_of("bars", "t", x=["json", "title"], series=series).axes[0]
    assert [str(bar.get_width()) for bar in axes.patches] == ["0.25", "nan", "1.0", "0.5"]
    assert axes.patches[0].get_facecolor() == pytest.approx(rgb(plots.COLOURS["none"]))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["json", "title"]
    assert axes.xaxis.get_major_formatter()(0.5) == "50%"
    (whisker,) = axes.collections
    assert whisker.get_segments()[0][:, 0] == pytest.approx([0.2, 0.4])


def rgb(colour: str) -> tuple[float, ...]:
    return (*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)), 1.0)


def test_many_bars_stand_in_two_columns():
    x = [f"row {i}" for i in range(plots.TWO_PANELS + 1)]
    made = figure_of("bars", "t", x=x, series={"a": list(range(len(x)))})
    shown = [label.get_text() for axes in made.axes for label in axes.get_yticklabels()]
    assert len(made.axes) == 2 and shown == x
    assert len({axes.get_xlim() for axes in made.axes}) == 1


def test_a_heat_map_shows_its_values_first_row_on_top():
    values = [[{"share": 0.1}, None], [{"share": 0.9}, {"share": 1.0}], [{"share": 0.0}, {"share": 0.5}]]
    axes = figure_of("heatmap", "t", rows=["a", "b", "c"], columns=["x", "y"], values=values).axes[0]
    assert [text.get_text() for text in axes.texts] == ["10%", "90%", "100%", "0%", "50%"]
    assert axes.texts[0].get_position() == (0, 0) and axes.texts[3].get_position() == (0, 2)
    assert axes.yaxis_inverted()
    assert axes.collections[0].get_array().mask.sum() == 1


def test_a_heat_map_of_both_signs_has_nought_in_the_middle():
    made = figure_of("heatmap", "t", rows=["a"], columns=["x", "y"], values=[[-0.2, 0.8]])
    assert made.axes[0].collections[0].get_clim() == (-0.8, 0.8)


@pytest.mark.parametrize("kind", ["bars", "lines", "heatmap"])
def test_every_kind_is_drawn_into_any_kind_of_file(results, tmp_path, kind):
    shown = [picture.plot for picture in markdown.all_plots(document(results))]
    every = [*shown, *map(typed, report_cases.odd_plots())]
    every = [plot for plot in every if type(plot).__name__.lower() == kind]
    assert len(every) >= 2
    for plot in every:
        plots.draw(plot, tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    plots.draw(every[0], tmp_path / "a.svg")
    plots.draw(every[0], stream := BytesIO())
    assert stream.getvalue() == (tmp_path / "a.svg").read_bytes()
    assert every[0].title in "".join(ElementTree.fromstring(stream.getvalue()).itertext())


def test_a_plot_that_can_not_be_drawn_says_why(tmp_path):
    plot = typed(report_cases.plot("lines", "t", x=[1], series={"a": [1]}))
    with pytest.raises(LocalsteerError, match="can't be drawn"):
        plots.draw(plot, tmp_path / "a.doc")
    with pytest.raises(LocalsteerError, match="can't be written"):
        plots.draw(plot, tmp_path / "none" / "a.png")


# --- writing -----------------------------------------------------------------------------------------------


def test_write_makes_both_files_and_the_pictures_that_one_of_them_shows(results, page, tmp_path):
    written = report.write(results, tmp_path / "run")
    assert written == (tmp_path / "run" / "report.md", tmp_path / "run" / "report.html")
    text = written[0].read_text(encoding="utf-8")
    shown = re.findall(r"\]\((plots/[^)]+)\)", text)
    assert len(shown) == len(set(shown)) == len(list(markdown.all_plots(document(results))))
    assert {tmp_path / "run" / name for name in shown} == set((tmp_path / "run" / "plots").iterdir())
    assert written[1].read_text(encoding="utf-8") == page.source


def test_results_that_can_not_be_shown_leave_the_report_before_as_it_is(small, tmp_path):
    written = report.write(small, tmp_path)
    before = [path.read_bytes() for path in written]
    with pytest.raises(LocalsteerError):
        report.write(small | {"suites": {"s": 3}}, tmp_path)
    assert [path.read_bytes() for path in written] == before
    assert not list(tmp_path.rglob("*.part"))


def test_a_folder_that_can_not_be_written(small, tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(LocalsteerError, match="can't write"):
        report.write(small, tmp_path / "file")


def test_without_matplotlib_the_report_lacks_plots_and_one_notice_says_so(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import report_cases; from localsteer.evaluate import report\n"
        "results = report_cases.results()\n"
        f"report.write(results, {str(tmp_path)!r}); report.write(results, {str(tmp_path)!r})"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("matplotlib") == done.stderr.count("\n") == 1
    assert 'pip install "localsteer[plot]"' in done.stderr
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "svg" not in page.tags and page.says("Plots are missing") and page.says("json")
    assert "![" not in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]


def test_what_is_not_needed_is_not_loaded():
    heavy = ("matplotlib", "jinja2", "rich", "torch", "llama_cpp")
    done = run(
        f"import sys; import localsteer.evaluate.report; print([x for x in {heavy} if x in sys.modules])"
    )
    assert done.stdout == "[]\n", done.stderr


def run(code: str) -> subprocess.CompletedProcess[str]:
    here = str(Path(report_cases.__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


# --- broken results ----------------------------------------------------------------------------------------


def in_suite(**changed) -> Callable[[dict], dict]:
    return lambda results: results | {"suites": {"s": {"title": "S", **changed}}}


def in_section(**changed) -> Callable[[dict], dict]:
    return in_suite(sections=[{"title": "a"}, {"title": "b", **changed}])


BROKEN = {
    "the whole: Expected `object`, got `array`": lambda results: [results],
    "format: Expected `int`, got `str`": lambda results: {**results, "format": "1"},
    "format: Expected `int` >= 1": lambda results: {**results, "format": 0},
    "(model: Expected `object": lambda results: results | {"model": "m.gguf"},
    "(vectors.json: Expected `object`": lambda results: results | {"vectors": {"lowercase": {}, "json": 3}},
    "(suites: Expected `object": lambda results: results | {"suites": []},
    "(suites.s: Expected `object`": lambda results: results | {"suites": {"s": None}},
    "(suites.s.title: Expected `str": in_suite(title=["S"]),
    "suites.s.conditions[1]: Expected `str`": in_suite(conditions=["none", 3]),
    "suites.s.instructions.json: Expected `object`": in_suite(instructions={"title": {}, "json": [1]}),
    "suites.s.instructions.json.none.n: Expected": in_suite(instructions={"json": {"none": {"n": "20"}}}),
    "suites.s.all.none.strict.low: Expected `int": in_suite(
        all={"both": {}, "none": {"strict": {"accuracy": 1, "low": "x"}}}
    ),
    "suites.s.all.none.quality.words: Expected `int": in_suite(
        all={"none": {"quality": {"repetition": 0, "words": [1]}}}
    ),
    "suites.s.sections: Expected `array`": in_suite(sections={}),
    "suites.s.sections[1].text: Expected `str": in_section(text=3),
    "sections[1].tables[0]: Object missing required field `columns`": in_section(tables=[{"rows": []}]),
    "sections[1].tables[0]: rows[0] must be 2 long, as the columns are": in_section(
        tables=[{"columns": ["a", "b"], "rows": [[1]]}]
    ),
    "tables[0].rows[0][0]: Object missing required field `share`": in_section(
        tables=[{"columns": ["a"], "rows": [[{"part": 1}]]}]
    ),
    "plots[0].kind: Invalid value 'pie": in_section(plots=[{"kind": "pie\n\x1b"}]),
    "(vectors.two\ufffdlines\ufffd: Expected": lambda results: results | {"vectors": {"two\nlines\x1b": 3}},
    "plots[0].x[0]: Expected `int": in_section(plots=[{"kind": "bars", "x": [[]], "series": {}}]),
    "plots[0]: series.a must be 1 long, as x is": in_section(
        plots=[{"kind": "bars", "x": ["j"], "series": {"a": []}}]
    ),
    "plots[0].series.a[0]: Expected `int": in_section(
        plots=[{"kind": "lines", "x": [1], "series": {"a": ["1"]}}]
    ),
    "plots[0]: values[0] must be 1 long, as the columns are": in_section(
        plots=[{"kind": "heatmap", "rows": ["a"], "columns": ["b"], "values": [[1, 2]]}]
    ),
}  # fmt: skip


@pytest.mark.parametrize("says", BROKEN)
def test_broken_results_name_the_place(results, says):
    broken = BROKEN[says](results)
    for show in (report.html.render, report.markdown.render, terminal):
        with pytest.raises(LocalsteerError) as error:
            show(broken)
        assert says in str(error.value) and "\n" not in str(error.value)


def test_results_of_a_newer_format_are_refused(results):
    with pytest.raises(LocalsteerError, match="format 2, this localsteer shows format 1: update localsteer"):
        report.html.render(results | {"format": 2})


def test_results_that_hold_next_to_nothing_can_be_shown():
    for results in (
        {"format": 1},
        {"format": 1, "suites": {"s": {}}},
        {"format": 1, "suites": {"s": {"all": {}}}},
    ):
        assert Page(report.html.render(results)).says("Evaluation")
        assert terminal(results) and report.markdown.render(results)
    assert figures.NONE == "-"


def test_a_full_disk_leaves_the_report_before_and_says_what_to_do(small, tmp_path, monkeypatch):
    written = report.write(small, tmp_path)
    before = [path.read_bytes() for path in written]

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(LocalsteerError, match=r"can't write .* \(No space left on device\): make room"):
        report.write(small, tmp_path)
    assert [path.read_bytes() for path in written] == before
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_changed_in_results_is_shown_or_refused(results, monkeypatch, seed):
    """Never a traceback: a value anywhere is replaced by one of another kind."""
    monkeypatch.setattr(plots, "available", lambda: False)  # drawing them is slow, and tested above
    draw, refused = random.Random(seed), 0
    for _ in range(25):
        broken = json.loads(json.dumps(results))
        table, key = draw.choice(list(places(broken)))
        table[key] = draw.choice(
            [None, True, -3, 1e300, "x", "", [], [[]], [1], {}, {"share": 0.5}, {"a": None}]
        )
        try:
            Page(report.html.render(broken))
            report.markdown.render(broken)
            terminal(broken)
        except LocalsteerError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 0 < refused < 25


def places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Every (table or list, key) of a document; the upper levels more than once, since most lie deep."""
    if isinstance(value, (dict, list)):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield from [(value, key)] * max(1, 40 - 8 * depth)
            yield from places(item, depth + 1)
