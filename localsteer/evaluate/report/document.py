"""What a report says, before it is decided how it looks: made from results.json, drawn by terminal.py,
markdown.py and html.py. Nothing here knows what any suite measures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from localsteer.evaluate.intervals import certain
from localsteer.evaluate.report import shape
from localsteer.evaluate.report.figures import (
    NONE,
    TableCell,
    cell,
    known,
    number,
    percent,
    ratio,
    share_cell,
    showable,
    value_of,
)

CONDITIONS = {
    "none": "the model alone, not a word of the instruction",
    "steered": "the vector, not a word of the instruction",
    "instructed": "the instruction stands in the prompt",
    "both": "the instruction in the prompt, and the vector",
    "random": "control: a random direction of the same length in the vector's place",
    "other": "control: another instruction's vector in its place",
}
COLUMNS = {
    "follows": "share of replies that follow the instruction (IFEval's strict rule) and are no loop; small "
    "figures are its 95% interval, by bootstrap over the queries",
    "loose": "the same by IFEval's loose rule, which forgives a first or last line and asterisks",
    "perplexity": "of the replies, to the unsteered model, as a multiple of that of its own plain replies: a "
    "few times is the price of following, far above is nonsense, far below 1 is a loop",
    "repetition": "share of runs of four tokens that stood in the reply before",
    "words": "mean length",
    "degenerate": "share of replies that are empty, loop, or are held at their start; they follow nothing",
    "subject kept": "share of replies that still name what was asked about",
}
PLOTTED = ("none", "steered", "instructed", "both", "random", "other")
SUMS = ("all", "mean")  # a last row of this name sums up the others
MAX_PLOTTED = 8  # conditions side by side
MAX_NAMED = 3  # vectors in one cell of settings
_SHORT_HASH = 12


@dataclass(frozen=True)
class Table:
    """rows: as wide as `columns`. strong_last: the last row sums up the others."""

    columns: tuple[str, ...]
    rows: tuple[tuple[TableCell, ...], ...]
    title: str = ""
    strong_last: bool = False

    def is_number(self, column: int) -> bool:
        """Whether to align a column to the right: it holds numbers, and nothing else but gaps."""
        cells = [row[column] for row in self.rows]
        return any(each.number for each in cells) and all(
            each.number or each.text in ("", NONE) for each in cells
        )


@dataclass(frozen=True)
class Plot:
    """name: of its picture file, unique in the report. spec: the plot as results.json describes it."""

    name: str
    spec: Mapping[str, Any]

    @property
    def title(self) -> str:
        return self.spec.get("title") or ""


@dataclass(frozen=True)
class Section:
    """title and paragraphs are plain text, with `names` between backticks."""

    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()


@dataclass(frozen=True)
class Suite:
    """overall: a row for each condition. instructions: one for each instruction. details: quality of each."""

    name: str
    title: str
    summary: str
    overall: Table | None
    plot: Plot | None
    instructions: Table | None
    details: Table | None
    sections: tuple[Section, ...]

    @property
    def headline(self) -> str:
        """The summary's first sentence."""
        return re.split(r"(?<=[.!?])\s", self.summary, maxsplit=1)[0]


@dataclass(frozen=True)
class Document:
    title: str
    subtitle: str
    suites: tuple[Suite, ...] = ()
    sections: tuple[Section, ...] = ()
    conditions: tuple[tuple[str, str], ...] = ()  # what the ones that occur mean
    columns: tuple[tuple[str, str], ...] = ()
    appendix: tuple[Table, ...] = field(default=())


def document(results: Any) -> Document:
    """Raises LocalsteerError for results that are broken, or of a newer format."""
    shape.check(results)
    results = showable(results)
    suites = results.get("suites") or {}
    names = [name for suite in suites.values() for name in suite.get("conditions", ())]
    return Document(
        title=_title(results),
        subtitle=_subtitle(results),
        suites=tuple(_suite(name, suite) for name, suite in suites.items()),
        sections=_sections(results.get("sections", ()), "section"),
        conditions=tuple((name, text) for name, text in CONDITIONS.items() if name in names),
        columns=tuple(COLUMNS.items()) if names else (),
        appendix=tuple(_appendix(results)),
    )


def _title(results: Mapping[str, Any]) -> str:
    model = results.get("model") or {}
    name = " ".join(str(model[key]) for key in ("name", "quantization") if model.get(key))
    return str(results.get("title") or (f"Evaluation of {name}" if name else "Evaluation"))


def _subtitle(results: Mapping[str, Any]) -> str:
    settings, seconds = results.get("settings") or {}, results.get("seconds")
    parts = [
        _counted(settings[key], f"{kind} query", f"{kind} queries") if settings.get(key) else ""
        for key, kind in (("n", "test"), ("n_validation", "validation"))
    ]
    parts.append(f"seed {settings['seed']}" if settings.get("seed") is not None else "")
    vectors = results.get("vectors")
    parts.append(_counted(len(vectors), "vector", "vectors") if vectors else "")
    parts.append(_duration(seconds) if isinstance(seconds, (int, float)) else "")
    parts.append(f"localsteer {results['localsteer']}" if results.get("localsteer") else "")
    return ", ".join(part for part in parts if part)


def _counted(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# --- a suite -----------------------------------------------------------------------------------------------


def _suite(name: str, suite: Mapping[str, Any]) -> Suite:
    rows, together = suite.get("instructions") or {}, suite.get("all") or {}
    conditions = _conditions(suite)
    return Suite(
        name=name,
        title=suite.get("title") or name,
        summary=str(suite.get("summary") or _summary(rows, together, conditions)),
        overall=_overall(together, conditions),
        plot=_conditions_plot(name, rows, conditions),
        instructions=_instructions(rows, together, conditions),
        details=_details(rows, conditions),
        sections=_sections(suite.get("sections", ()), name),
    )


def _conditions(suite: Mapping[str, Any]) -> list[str]:
    """Those that were announced, in that order, then any others that have figures."""
    tables = [suite.get("all") or {}, *(suite.get("instructions") or {}).values()]
    return list(dict.fromkeys([*suite.get("conditions", ()), *(name for table in tables for name in table)]))


def _accuracy(figures: Mapping[str, Any] | None, rule: str = "strict") -> Mapping[str, Any]:
    return (figures or {}).get(rule) or {}


def _follows(figures: Mapping[str, Any] | None, rule: str = "strict") -> TableCell:
    found = _accuracy(figures, rule)
    return share_cell(found.get("accuracy"), found.get("low"), found.get("high"))


def _summary(rows: Mapping[str, Any], together: Mapping[str, Any], conditions: Sequence[str]) -> str:
    """One line for a reader in a hurry."""
    shares = {name: _follows(together.get(name)) for name in conditions}
    shares = {name: found for name, found in shares.items() if found.text != NONE}
    if not shares:
        return f"{len(rows)} instructions, {len(conditions)} conditions."
    if not {"none", "steered"} <= shares.keys():
        listed = ", ".join(f"{name} {found.text}" for name, found in list(shares.items())[:MAX_PLOTTED])
        return f"Replies that follow: {listed}."
    return " ".join(_sentences(shares, rows, together))


def _sentences(
    shares: Mapping[str, TableCell], rows: Mapping[str, Any], together: Mapping[str, Any]
) -> Iterator[str]:
    steered = shares["steered"]
    spread = f" ({steered.minor})" if steered.minor else ""
    yield f"{steered.text}{spread} of the steered replies follow, {shares['none'].text} of the unsteered."
    if "instructed" in shares:
        both = f", {shares['both'].text} with the vector as well" if "both" in shares else ""
        yield f"With the instruction in the prompt {shares['instructed'].text}{both}."
    controls = {"random": "a random direction", "other": "another vector"}
    found = [f"{text} {shares[name].text}" for name, text in controls.items() if name in shares]
    if found:
        yield f"In the vector's place: {', '.join(found)}."
    if len(rows) > 1:
        yield _lifted(rows)
    quality = (together.get("steered") or {}).get("quality") or {}
    cost, broken = ratio(quality.get("perplexity_ratio")), percent(quality.get("degenerate"))
    yield f"Steered perplexity {cost}, degenerate {broken}."


def _lifted(rows: Mapping[str, Any]) -> str:
    """How many instructions the vector helps for certain: the intervals lie apart."""
    lifted, n_known = 0, 0
    for row in rows.values():
        steered, none = (certain(row.get(name) or {}, "strict") for name in ("steered", "none"))
        if steered and none:
            n_known += 1
            lifted += steered[0] > none[1]
    return f"Steering lifts {lifted} of {n_known} instructions beyond their intervals." if n_known else ""


def _overall(together: Mapping[str, Any], conditions: Sequence[str]) -> Table | None:
    found = [name for name in conditions if name in together]
    return _quality_table([((name,), together[name]) for name in found], ("condition",))


def _details(rows: Mapping[str, Any], conditions: Sequence[str]) -> Table | None:
    labelled = [
        ((instruction, name), row[name])
        for instruction, row in rows.items()
        for name in conditions
        if name in row
    ]
    return _quality_table(labelled, ("instruction", "condition"))


def _quality_table(
    labelled: Sequence[tuple[tuple[str, ...], Mapping[str, Any]]], labels: Sequence[str]
) -> Table | None:
    """A row for each label; a column for each figure that is known of any. Figures that nothing here has
    heard of (a judge's) get columns of their own."""
    rules = list(dict.fromkeys(key for _, found in labelled for key in found if _is_rule(found[key])))
    extra = [key for key in rules if key not in ("strict", "loose")]
    qualities = {key for _, found in labelled for key in found.get("quality") or {}}
    columns: dict[str, Callable[[Mapping[str, Any]], TableCell]] = {
        "n": lambda found: cell(found.get("n")),
        "follows": lambda found: _follows(found),
        "loose": lambda found: _follows(found, "loose"),
        **{key: lambda found, key=key: _follows(found, key) for key in extra},
    }
    for key, (title, shown) in QUALITY.items():
        if key in qualities:
            columns[title] = lambda found, key=key, shown=shown: shown((found.get("quality") or {}).get(key))
    for key in sorted(qualities - QUALITY.keys() - {"perplexity"}):
        columns[key.replace("_", " ")] = lambda found, key=key: cell((found.get("quality") or {}).get(key))
    rows = [[column(found) for column in columns.values()] for _, found in labelled]
    kept = [i for i in range(len(columns)) if any(row[i].text != NONE for row in rows)]
    if not kept:
        return None
    lines = tuple(
        (*map(TableCell, names), *(row[i] for i in kept))
        for (names, _), row in zip(labelled, rows, strict=True)
    )
    return Table((*labels, *(list(columns)[i] for i in kept)), lines)


def _is_rule(value: Any) -> bool:
    return isinstance(value, Mapping) and "accuracy" in value


def _plain_share(value: float | None) -> TableCell:
    """Without a bar: a high share is not always good news."""
    return TableCell(percent(value), number=True)


QUALITY: Mapping[str, tuple[str, Callable[[float | None], TableCell]]] = {
    "perplexity_ratio": ("perplexity", lambda value: TableCell(ratio(value), number=True)),
    "repetition": ("repetition", _plain_share),
    "words": ("words", lambda value: TableCell(number(value), number=True)),
    "degenerate": ("degenerate", _plain_share),
    "subject_kept": ("subject kept", _plain_share),
}


def _instructions(
    rows: Mapping[str, Any], together: Mapping[str, Any], conditions: Sequence[str]
) -> Table | None:
    """The share that follows in each condition, how the vector is applied and what that costs in perplexity;
    None where nothing is known of any."""
    names = [
        name for name in conditions if any(_follows(row.get(name)).text != NONE for row in rows.values())
    ]
    if not names:
        return None
    applied = next((name for name in conditions if any(_settings(row, name) for row in rows.values())), None)
    last = (f"perplexity, {applied}", f"{applied} at") if applied else ()
    lines = [_instruction(name, row, names, applied) for name, row in rows.items()]
    has_all = len(rows) > 1 and any(name in together for name in names)
    if has_all:
        lines.append(_instruction("all", together, names, applied))
    return Table(("instruction", *names, *last), tuple(lines), strong_last=has_all)


def _instruction(
    label: str, row: Mapping[str, Any], names: Sequence[str], applied: str | None
) -> tuple[TableCell, ...]:
    shares = [_follows(row.get(name)) for name in names]
    if applied is None:
        return (TableCell(label), *shares)
    quality = (row.get(applied) or {}).get("quality") or {}
    cost = TableCell(ratio(quality.get("perplexity_ratio")), number=True)
    return (TableCell(label), *shares, cost, TableCell(settings_text(_settings(row, applied))))


def _settings(row: Mapping[str, Any], condition: str) -> Any:
    return (row.get(condition) or {}).get("settings")


def settings_text(settings: Any) -> str:
    """`block 2, prompt, project, 1`; several vectors are parted by a plus sign."""
    if isinstance(settings, (list, tuple)):
        parts = list(dict.fromkeys(settings_text(each) for each in settings))
        more = f" and {len(parts) - MAX_NAMED} more" if len(parts) > MAX_NAMED else ""
        return " + ".join(parts[:MAX_NAMED]) + more
    if not isinstance(settings, Mapping):
        return ""
    parts = [str(settings[key]) for key in ("positions", "mode") if settings.get(key)]
    strength = settings.get("strength")
    parts += [f"x{strength:g}"] if isinstance(strength, (int, float)) else []
    return ", ".join([*_block(settings.get("layer")), *parts])


def _block(layer: Any) -> list[str]:
    layers = layer if isinstance(layer, (list, tuple)) else [] if layer is None else [layer]
    if not layers:
        return []
    return [f"block{'s' if len(layers) > 1 else ''} {' '.join(map(str, layers))}"]


def _conditions_plot(suite: str, rows: Mapping[str, Any], conditions: Sequence[str]) -> Plot | None:
    """Bars of the conditions, for each instruction."""
    usual = [name for name in PLOTTED if name in conditions]
    names = (usual or list(conditions))[:MAX_PLOTTED]
    series = {name: [_point(row.get(name)) for row in rows.values()] for name in names}
    if not any(point is not None for values in series.values() for point in values):
        return None
    title = "Replies that follow, by instruction and condition"
    spec = {"kind": "bars", "title": title, "x_label": "", "y_label": "replies that follow", "x": list(rows)}
    return Plot(f"{slug(suite)}-conditions", {**spec, "series": series})


def _point(figures: Mapping[str, Any] | None) -> dict[str, Any] | None:
    found = _accuracy(figures)
    if found.get("accuracy") is None:
        return None
    return {"share": found["accuracy"], "low": found.get("low"), "high": found.get("high")}


# --- sections and the appendix -----------------------------------------------------------------------------


def _sections(sections: Sequence[Mapping[str, Any]], owner: str) -> tuple[Section, ...]:
    numbered = iter(range(1, 10_000))
    return tuple(
        Section(
            title=section.get("title") or "",
            paragraphs=tuple(_paragraphs(section.get("text") or "")),
            tables=tuple(_table(table) for table in section.get("tables") or ()),
            plots=tuple(
                Plot(f"{slug(owner)}-{next(numbered)}", plot)
                for plot in section.get("plots") or ()
                if _shows_something(plot)
            ),
        )
        for section in sections
    )


def _shows_something(plot: Mapping[str, Any]) -> bool:
    rows = plot["values"] if plot["kind"] == "heatmap" else plot["series"].values()
    return any(known(value_of(point)) for row in rows for point in row)


def _paragraphs(text: str) -> Iterator[str]:
    """Parted by empty lines; a single line break is a blank."""
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.strip():
            yield " ".join(paragraph.split())


def _table(table: Mapping[str, Any]) -> Table:
    rows = tuple(tuple(cell(value) for value in row) for row in table["rows"])
    strong = len(rows) > 1 and bool(rows[-1]) and rows[-1][0].text in SUMS
    return Table(tuple(map(str, table["columns"])), rows, str(table.get("title") or ""), strong)


def _appendix(results: Mapping[str, Any]) -> Iterator[Table]:
    """What is needed to repeat the run: settings, hashes, versions."""
    keys = ("command", "localsteer", "llama_cpp", "machine", "seconds")
    run = {key: results[key] for key in keys if results.get(key) is not None}
    if run:
        yield _pairs("Run", run)
    for title, key in (
        ("Model", "model"),
        ("Base model", "base"),
        ("Settings", "settings"),
        ("Files (sha256)", "files"),
    ):
        if results.get(key):
            yield _pairs(title, results[key])
    if results.get("vectors"):
        yield _vectors(results["vectors"])


def _pairs(title: str, found: Mapping[str, Any]) -> Table:
    return Table(
        ("name", "value"), tuple((TableCell(str(key)), _plain(value)) for key, value in found.items()), title
    )


def _plain(value: Any) -> TableCell:
    """As cell, for values of any kind; never aligned to the right."""
    if isinstance(value, Mapping):
        return TableCell(", ".join(f"{key} {_plain(each).text}" for key, each in value.items()))
    if isinstance(value, int) and not isinstance(value, bool):
        return TableCell(str(value))  # a seed has no thousands
    if isinstance(value, (list, tuple)):
        return TableCell(", ".join(_plain(each).text for each in value))
    return TableCell(cell(value).text)


def _vectors(vectors: Mapping[str, Mapping[str, Any]]) -> Table:
    def line(name: str, vector: Mapping[str, Any]) -> tuple[TableCell, ...]:
        hashes = (str(vector.get(key) or NONE)[:_SHORT_HASH] for key in ("sha256", "source_sha256"))
        return (TableCell(name), TableCell(settings_text(vector) or NONE), *map(TableCell, hashes))

    columns = ("vector", "settings", "sha256", "sha256 of its model")
    return Table(columns, tuple(line(name, vector) for name, vector in vectors.items()), "Vectors")


def spans(text: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces, each with whether it is a name that stood between backticks."""
    for i, piece in enumerate(re.split(r"`([^`]+)`", text)):
        if piece:
            yield piece, i % 2 == 1


def slug(text: str) -> str:
    """For file names and anchors."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"
