"""Writes the tables of measured figures in docs/ from docs/results/: python docs/make_results.py

Each stands between the marks `<!-- NAME begin -->` and `<!-- NAME end -->` of its page. The text around it is
written by hand: read it again when the results are made again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
EVALS = {"Q8_0": "eval-q8_0", "Q4_K_M": "eval-q4_k_m"}

Document = dict[str, Any]


def pages() -> dict[Path, str]:
    """The whole of each page, its tables made anew."""
    found: dict[Path, str] = {}
    for (name, page), rows in TABLES.items():
        path = DOCS / page
        text = found.get(path) or path.read_text("utf-8")
        between = re.compile(rf"(<!-- {name} begin -->\n).*?(<!-- {name} end -->)", re.S)
        if not between.search(text):
            raise SystemExit(f"{page} has no marks for {name}")
        made = "\n".join(rows())
        found[path] = between.sub(lambda marks, made=made: f"{marks[1]}{made}\n{marks[2]}", text)
    return found


def evaluations() -> Iterator[str]:
    evals = [_read(RESULTS / name / "results.json") for name in EVALS.values()]
    bundled = _read(RESULTS / "bundled-model.json")
    yield f"| Question | {' | '.join(EVALS)} |"
    yield "|---|" + "---|" * len(EVALS)
    for what, figure in STEERED.items():
        yield _row(what, (figure(bundled["steered"][quant]) for quant in EVALS))
    for what, figure in SUITES.items():
        yield _row(what, (figure(each["suites"]) for each in evals))
    means = bundled["told"]["means"]
    for what in means:
        yield _row(f"told in words: {what}", [percent(means[what]["followed"]), ""])


def speed() -> Iterator[str]:
    """What steering costs, one sequence at a time."""
    document = _read(RESULTS / "decode_overhead.json")
    yield "| Ratio to unsteered | prefill | decode |"
    yield "|---|---|---|"
    for name, row in document["variants"].items():
        if name != "unsteered":
            yield _row(name, (f"{row[f'{phase}_ratio']:.3f}" for phase in ("prefill", "decode")))


def concurrency() -> Iterator[str]:
    document = _read(RESULTS / "concurrency.json")
    yield "| Ratio | measured | asked for |"
    yield "|---|---|---|"
    for name, ratio in document["ratios"].items():
        yield _row(name, [f"{ratio:.2f}", str(document["bounds"].get(name, ""))])


def soak() -> Iterator[str]:
    document = _read(RESULTS / "server_soak.json")
    memory = document["memory_mb"]
    yield "| Minutes | Requests | Lost replies | Slots in use at the end | Memory, first and last quarter |"
    yield "|---|---|---|---|---|"
    requests = f"{sum(document['requests'].values()):,}"
    quarters = f"{memory['first_quarter']:.0f} MB, {memory['last_quarter']:.0f} MB"
    lost, running = document["lost"], document["counts"]["running"]
    yield _row(f"{document['minutes']:g}", [requests, str(lost), str(running), quarters])


def packs() -> Iterator[str]:
    yield "| Model | Instruction | Setting | plain | steered | told | told and steered | of |"
    yield "|---|---|---|---|---|---|---|---|"
    for path in sorted((DOCS.parent / "localsteer" / "packs").glob("*/pack.json")):
        pack = _read(path)
        for name, row in pack["instructions"].items():
            scores = [row["scores"][key] for key in ("none", "steered", "instructed", "both")]
            cells = ["-" if score is None else percent(score) for score in scores]
            where = f"{row['mode']} at block {', '.join(map(str, row['layers']))}, {row['positions']}"
            setting = f"{where}, strength {row['strength']:g}" if row["strength"] else "nothing helps"
            yield _row(f"{pack['model']} {pack['quantization']}", [name, setting, *cells, str(row["n"])])


def ensuring() -> Iterator[str]:
    document = _read(RESULTS / "ensure.json")
    ways = ("plain", "always", "ensure")
    heads = [f"followed: {' | '.join(ways)}", f"tokens: {' | '.join(ways)}"]
    yield f"| | {' | '.join(heads)} | perplexity where plain complied: {' | '.join(ways)} | replies |"
    yield "|---|" + "---|" * 10
    for name, row in document["mean"].items():
        cells = [percent(row[way]["followed"]) for way in ways]
        cells += [f"{row[way]['tokens']:.0f}" for way in ways]
        known = [row[way]["perplexity_complied"] for way in ways]
        cells += ["-" if each is None else f"{each:.2f}" for each in known]
        yield _row(f"{name} ({row['n']})", [*cells, f"{row['tries']:.2f}"])


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


def _share(rows: Document, condition: str) -> str:
    """The mean; where no setting of an instruction won it has no controls, and how many have is said."""
    found = [row[condition]["strict"]["accuracy"] for row in rows.values() if condition in row]
    return percent(fmean(found)) + (f" ({len(found)} of {len(rows)})" if len(found) < len(rows) else "")


def _shares(suite: str, pattern: str, *conditions: str) -> Callable[[Document], str]:
    """Mean over the instructions whose id is like pattern, for each condition."""

    def figure(suites: Document) -> str:
        rows = {id: row for id, row in suites[suite]["instructions"].items() if re.fullmatch(pattern, id)}
        return ", ".join(f"{each} {_share(rows, each)}" for each in conditions)

    return figure


def _excluded(word: str, *more: str) -> Callable[[Document], str]:
    return _shares("words", f"exclude_word:{word}", "none", "steered", "random", "other", *more)


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


OWN = ("own", "own random", "own other")
STEERED = {
    "formats and lengths, steered, settings free": _regime("free"),
    "middle blocks, prompt positions": _regime("middle, prompt"),
    "middle blocks, all positions (the paper's setting)": _regime("middle, all"),
}
SUITES = {
    "instruction in the prompt": _shares("format", ".*", "instructed", "both"),
    "paraphrases that are followed badly": _paraphrases,
    "mean words, conciseness at growing strength": _words("conciseness"),
    "mean words, verbosity at growing strength": _words("verbosity"),
    "a word included": _shares("words", "include.*", "none", "steered", "random", "other"),
    "a word excluded that the question's context brings": _excluded("[^:]*:context", *OWN),
    "a word excluded that every reply holds": _excluded("[^:]*", *OWN),
    "a word excluded that the prompt asks for": _excluded("[^:]*:asked"),
    "two instructions at once": _shares(
        "composition", ".*", "none", "same block", "different blocks", "random", "other"
    ),
    "on the base model": _shares("cross-model", ".*", "none", "own", "instruct", "instructed"),
}


TABLES: dict[tuple[str, str], Callable[[], Iterator[str]]] = {
    ("packs", "packs.md"): packs,
    ("evaluations", "results/README.md"): evaluations,
    ("speed", "results/README.md"): speed,
    ("concurrency", "results/README.md"): concurrency,
    ("soak", "results/README.md"): soak,
    ("ensure", "ensure.md"): ensuring,
}

if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
