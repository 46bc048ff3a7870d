"""Writes the table of docs/results/README.md from the results beside it: python docs/make_results.py

The text around the table is written by hand and holds no figures of these files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

RESULTS = Path(__file__).with_name("results")
EVALS = {"Q8_0": "eval-q8_0", "Q4_K_M": "eval-q4_k_m"}
BETWEEN = re.compile(r"(<!-- make_results begin -->\n).*?(<!-- make_results end -->)", re.S)

Document = dict[str, Any]


def page(folder: Path = RESULTS) -> str:
    """The whole of README.md, its table made anew."""
    text = (folder / "README.md").read_text("utf-8")
    return BETWEEN.sub(lambda found: found[1] + "\n".join(table(folder)) + "\n" + found[2], text)


def table(folder: Path) -> Iterator[str]:
    evals = [_read(folder / name / "results.json") for name in EVALS.values()]
    bundled = _read(folder / "bundled-model.json")
    yield f"| Question | {' | '.join(EVALS)} |"
    yield "|---|" + "---|" * len(EVALS)
    for what, figure in STEERED.items():
        yield _row(what, (figure(bundled["steered"][quant]) for quant in EVALS))
    for what, figure in SUITES.items():
        yield _row(what, (figure(each["suites"]) for each in evals))
    means = bundled["told"]["means"]
    for what in means:
        yield _row(f"told in words: {what}", [percent(means[what]["followed"]), ""])


def _read(path: Path) -> Document:
    return json.loads(path.read_text("utf-8"))


def _row(what: str, figures: Iterator[str] | list[str]) -> str:
    return f"| {what} | {' | '.join(figures)} |"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%".replace(".0%", "%")


def _regime(name: str) -> Callable[[Document], str]:
    def figure(steered: Document) -> str:
        found = steered[name]["summary"]
        controls = max(found[each]["mean"] for each in ("none", "random", "other"))
        return (
            f"{percent(found['steered']['mean'])} (controls at most {percent(controls)}; "
            f"lowest {percent(found['worst']['steered'])} {found['worst']['id']}; "
            f"degenerate {percent(found['degenerate'])}; subject named {percent(found['subject_kept'])})"
        )

    return figure


def _share(rows: Document, condition: str) -> float:
    return fmean(row[condition]["strict"]["accuracy"] for row in rows.values() if condition in row)


def _shares(suite: str, prefix: str, *conditions: str) -> Callable[[Document], str]:
    """Mean over the instructions whose id begins with prefix, for each condition."""

    def figure(suites: Document) -> str:
        rows = {id: row for id, row in suites[suite]["instructions"].items() if id.startswith(prefix)}
        return ", ".join(f"{each} {percent(_share(rows, each))}" for each in conditions)

    return figure


def _words(direction: str) -> Callable[[Document], str]:
    """Mean words at each strength of the sweep, the unsteered model first."""

    def figure(suites: Document) -> str:
        row = suites["length"]["instructions"][direction]
        names = ["none", *(name for name in row if name.startswith("strength"))]
        return ", ".join(f"{row[name]['quality']['words']:.1f}" for name in names)

    return figure


def _paraphrases(suites: Document) -> str:
    section = next(each for each in suites["format"]["sections"] if each["title"].startswith("Paraphrases"))
    _, count, told, both, _ = section["tables"][0]["rows"][-1]
    return f"{count} wordings: told {percent(told['share'])}, both {percent(both['share'])}"


STEERED = {
    "formats and lengths, steered, settings free": _regime("free"),
    "middle blocks, prompt positions": _regime("middle, prompt"),
    "middle blocks, all positions (the paper's setting)": _regime("middle, all"),
}
SUITES = {
    "instruction in the prompt": _shares("format", "", "instructed", "both"),
    "paraphrases that are followed badly": _paraphrases,
    "mean words, conciseness at growing strength": _words("conciseness"),
    "mean words, verbosity at growing strength": _words("verbosity"),
    "a word included": _shares("words", "include", "none", "steered", "random", "other"),
    "a word avoided": _shares("words", "exclude", "none", "steered", "random", "other", "own"),
    "two instructions at once": _shares(
        "composition", "", "none", "same block", "different blocks", "random"
    ),
    "on the base model": _shares("cross-model", "", "none", "own", "instruct", "instructed"),
}


if __name__ == "__main__":
    written = page()
    (RESULTS / "README.md").write_text(written, encoding="utf-8")
