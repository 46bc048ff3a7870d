"""What a report says, before it is decided how it looks: made from results.json, drawn by terminal.py,
markdown.py and html.py. Nothing here knows what any suite measures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localsteer.evaluate.intervals import certain
from localsteer.evaluate.page import (
    AnyPlot,
    Applied,
    Bars,
    ByCondition,
    Facts,
    Figures,
    Results,
    Section,
    Share,
    SuiteReport,
    Table,
    loaded,
    plain,
)
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
    "none": "the plain model, not a word of the instruction",
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
class Grid:
    """rows: as wide as `columns`. strong_last: the last row sums up the others."""

    columns: tuple[str, ...]
    rows: tuple[tuple[TableCell, ...], ...]
    title: str = ""
    strong_last: bool = False

    def is_number(self, column: int) -> bool:
        """Whether to align a column to the right: it holds numbers, and nothing else but gaps."""
        cells = [row[column] for row in self.rows]
        return any(cell.number for cell in cells) and all(
            cell.number or cell.text in ("", NONE) for cell in cells
        )


@dataclass(frozen=True)
class Picture:
    """name: of its file, unique in the report."""

    name: str
    plot: AnyPlot

    @property
    def title(self) -> str:
        return self.plot.title or ""


@dataclass(frozen=True)
class Passage:
    """title and paragraphs are plain text, with `names` between backticks."""

    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Grid, ...] = ()
    plots: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Suite:
    """overall: a row for each condition. instructions: one for each instruction. details: quality of each."""

    name: str
    title: str
    summary: str
    overall: Grid | None
    plot: Picture | None
    instructions: Grid | None
    details: Grid | None
    sections: tuple[Passage, ...]

    @property
    def headline(self) -> str:
        """The summary's first sentence."""
        return re.split(r"(?<=[.!?])\s", self.summary, maxsplit=1)[0]


@dataclass(frozen=True)
class Document:
    title: str
    subtitle: str
    suites: tuple[Suite, ...] = ()
    sections: tuple[Passage, ...] = ()
    conditions: tuple[tuple[str, str], ...] = ()  # what the ones that occur mean
    columns: tuple[tuple[str, str], ...] = ()
    appendix: tuple[Grid, ...] = ()


def document(results: Any) -> Document:
    """results: Results, or what results.json holds. Raises LocalsteerError for results that are broken, or of
    a newer format."""
    results = loaded(showable(plain(loaded(results))))
    suites = results.suites or {}
    names = [name for suite in suites.values() for name in suite.conditions]
    return Document(
        title=_title(results),
        subtitle=_subtitle(results),
        suites=tuple(_suite(name, suite) for name, suite in suites.items()),
        sections=_passages(results.sections, "section"),
        conditions=tuple((name, text) for name, text in CONDITIONS.items() if name in names),
        columns=tuple(COLUMNS.items()) if names else (),
        appendix=tuple(_appendix(results)),
    )


def _title(results: Results) -> str:
    name = model_label(results.model)
    return results.title or (f"Evaluation of {name}" if name else "Evaluation")


def model_label(model: Facts | None) -> str:
    """`SmolLM2 Q4_K_M`, as far as it is known."""
    return " ".join(str(model[key]) for key in ("name", "quantization") if model.get(key)) if model else ""


def _subtitle(results: Results) -> str:
    settings = results.settings or {}
    parts = [
        _counted(settings[key], f"{kind} query", f"{kind} queries") if settings.get(key) else ""
        for key, kind in (("n", "test"), ("n_validation", "validation"))
    ]
    parts.append(f"seed {settings['seed']}" if settings.get("seed") is not None else "")
    parts.append(_counted(len(results.vectors), "vector", "vectors") if results.vectors else "")
    parts.append(_duration(results.seconds) if results.seconds is not None else "")
    parts.append(f"localsteer {results.localsteer}" if results.localsteer else "")
    return ", ".join(part for part in parts if part)


def _counted(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# --- a suite -----------------------------------------------------------------------------------------------


def _suite(name: str, suite: SuiteReport) -> Suite:
    rows, together = suite.instructions, suite.all or {}
    # those that were announced, in that order, then any others that have figures
    measured = (condition for row in (together, *rows.values()) for condition in row)
    conditions = list(dict.fromkeys([*suite.conditions, *measured]))
    pairs = {(label, name): row[name] for label, row in rows.items() for name in conditions if name in row}
    return Suite(
        name=name,
        title=suite.title or name,
        summary=suite.summary or _summary(rows, together, conditions),
        overall=_quality_grid({(c,): together[c] for c in conditions if c in together}, ("condition",)),
        plot=_conditions_plot(name, rows, conditions),
        instructions=_instructions(rows, together, conditions),
        details=_quality_grid(pairs, ("instruction", "condition")),
        sections=_passages(suite.sections, name),
    )


def _follows(figures: Figures | None, rule: str = "strict") -> TableCell:
    return share_cell((figures or Figures()).rule(rule).share)


def _summary(rows: Mapping[str, ByCondition], together: ByCondition, conditions: Sequence[str]) -> str:
    """One line for a reader in a hurry."""
    shares = {name: _follows(together.get(name)) for name in conditions}
    shares = {name: share for name, share in shares.items() if share.text != NONE}
    if not shares:
        return f"{len(rows)} instructions, {len(conditions)} conditions."
    if not {"none", "steered"} <= shares.keys():
        listed = ", ".join(f"{name} {share.text}" for name, share in list(shares.items())[:MAX_PLOTTED])
        return f"Replies that follow: {listed}."
    return " ".join(_sentences(shares, rows, together["steered"]))


def _sentences(
    shares: Mapping[str, TableCell], rows: Mapping[str, ByCondition], figures: Figures
) -> Iterator[str]:
    """figures: of the steered replies together."""
    steered = shares["steered"]
    spread = f" ({steered.minor})" if steered.minor else ""
    yield f"{steered.text}{spread} of the steered replies follow, {shares['none'].text} of the unsteered."
    if "instructed" in shares:
        both = f", {shares['both'].text} with the vector as well" if "both" in shares else ""
        yield f"With the instruction in the prompt {shares['instructed'].text}{both}."
    controls = {"random": "a random direction", "other": "another vector"}
    named = [f"{text} {shares[name].text}" for name, text in controls.items() if name in shares]
    if named:
        yield f"In the vector's place: {', '.join(named)}."
    if len(rows) > 1:
        yield _lifted(rows)
    cost, broken = ratio(figures.measure("perplexity_ratio")), percent(figures.measure("degenerate"))
    yield f"Steered perplexity {cost}, degenerate {broken}."


def _lifted(rows: Mapping[str, ByCondition]) -> str:
    """How many instructions the vector helps for certain: the intervals lie apart."""
    lifted, n_known = 0, 0
    for row in rows.values():
        steered, none = (certain(row.get(name), "strict") for name in ("steered", "none"))
        if steered and none:
            n_known += 1
            lifted += steered[0] > none[1]
    return f"Steering lifts {lifted} of {n_known} instructions beyond their intervals." if n_known else ""


def _quality_grid(labelled: Mapping[tuple[str, ...], Figures], labels: Sequence[str]) -> Grid | None:
    """A row for each label; a column for each figure that is known of any. Measures that nothing here has
    heard of get columns of their own."""
    columns: dict[str, Callable[[Figures], TableCell]] = {
        "n": lambda figures: cell(figures.n),
        "follows": _follows,
        "loose": lambda figures: _follows(figures, "loose"),
    }
    measured = {key for figures in labelled.values() for key in figures.quality or {}}
    for key in [*QUALITY, *sorted(measured - QUALITY.keys() - {"perplexity"})]:
        title, shown = QUALITY.get(key, (key.replace("_", " "), cell))
        columns[title] = lambda figures, key=key, shown=shown: shown(figures.measure(key))
    rows = {names: [shown(figures) for shown in columns.values()] for names, figures in labelled.items()}
    kept = [i for i in range(len(columns)) if any(row[i].text != NONE for row in rows.values())]
    if not kept:
        return None
    lines = tuple((*map(TableCell, names), *(row[i] for i in kept)) for names, row in rows.items())
    return Grid((*labels, *(list(columns)[i] for i in kept)), lines)


def _plain_share(value: float | None) -> TableCell:
    """Without a bar: a high share is not always good news."""
    return TableCell(percent(value), number=True)


def _ratio(value: float | None) -> TableCell:
    return TableCell(ratio(value), number=True)


QUALITY: Mapping[str, tuple[str, Callable[[float | None], TableCell]]] = {
    "perplexity_ratio": ("perplexity", _ratio),
    "repetition": ("repetition", _plain_share),
    "words": ("words", lambda value: TableCell(number(value), number=True)),
    "degenerate": ("degenerate", _plain_share),
    "subject_kept": ("subject kept", _plain_share),
}


def _instructions(
    rows: Mapping[str, ByCondition], together: ByCondition, conditions: Sequence[str]
) -> Grid | None:
    """The share that follows in each condition, how the vector is applied and what that costs in perplexity;
    None where nothing is known of any."""
    names = [
        name for name in conditions if any(_follows(row.get(name)).text != NONE for row in rows.values())
    ]
    if not names:
        return None
    steered = [name for name in conditions if any(row[name].settings for row in rows.values() if name in row)]
    applied = steered[0] if steered else None
    last = (f"perplexity, {applied}", f"{applied} at") if applied else ()
    lines = [_instruction(name, row, names, applied) for name, row in rows.items()]
    has_all = len(rows) > 1 and any(name in together for name in names)
    if has_all:
        lines.append(_instruction("all", together, names, applied))
    return Grid(("instruction", *names, *last), tuple(lines), strong_last=has_all)


def _instruction(
    label: str, row: ByCondition, names: Sequence[str], applied: str | None
) -> tuple[TableCell, ...]:
    shares = [_follows(row.get(name)) for name in names]
    if applied is None:
        return (TableCell(label), *shares)
    steered = row.get(applied) or Figures()
    where = TableCell(settings_text(steered.settings))
    return (TableCell(label), *shares, _ratio(steered.measure("perplexity_ratio")), where)


def settings_text(settings: Applied | Sequence[Applied] | None) -> str:
    """`layer 2, prompt, project, x1`, with a plus sign between those of several vectors."""
    if settings is None:
        return ""
    if not isinstance(settings, Applied):
        texts = list(dict.fromkeys(map(settings_text, settings)))
        more = f" and {len(texts) - MAX_NAMED} more" if len(texts) > MAX_NAMED else ""
        return " + ".join(texts[:MAX_NAMED]) + more
    layers = [settings.layer] if isinstance(settings.layer, int) else settings.layer or []
    where = f"layer{'s' if len(layers) > 1 else ''} {' '.join(map(str, layers))}" if layers else None
    strength = None if settings.strength is None else f"x{settings.strength:g}"
    return ", ".join(filter(None, (where, settings.positions, settings.mode, strength)))


def _conditions_plot(
    suite: str, rows: Mapping[str, ByCondition], conditions: Sequence[str]
) -> Picture | None:
    """Bars of the conditions, for each instruction."""
    usual = [name for name in PLOTTED if name in conditions]
    names = (usual or list(conditions))[:MAX_PLOTTED]
    series = {name: [_point(row.get(name)) for row in rows.values()] for name in names}
    title = "Replies that follow, by instruction and condition"
    plot = Bars(title=title, y_label="replies that follow", x=list(rows), series=series)
    return Picture(f"{slug(suite)}-conditions", plot) if any(plot.points()) else None


def _point(figures: Figures | None) -> Share | None:
    share = (figures or Figures()).rule("strict").share
    return None if share.share is None else share


# --- sections and the appendix -----------------------------------------------------------------------------


def _passages(sections: Sequence[Section], owner: str) -> tuple[Passage, ...]:
    numbered = iter(range(1, 10_000))
    return tuple(
        Passage(
            title=section.title or "",
            paragraphs=tuple(_paragraphs(section.text or "")),
            tables=tuple(map(_grid, section.tables)),
            plots=tuple(
                Picture(f"{slug(owner)}-{next(numbered)}", plot)
                for plot in section.plots
                if any(known(value_of(point)) for point in plot.points())
            ),
        )
        for section in sections
    )


def _paragraphs(text: str) -> Iterator[str]:
    """An empty line ends one; a single line break is a blank."""
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.strip():
            yield " ".join(paragraph.split())


def _grid(table: Table) -> Grid:
    rows = tuple(tuple(map(cell, row)) for row in table.rows)
    strong = len(rows) > 1 and bool(rows[-1]) and rows[-1][0].text in SUMS
    return Grid(tuple(map(str, table.columns)), rows, table.title or "", strong)


def _appendix(results: Results) -> Iterator[Grid]:
    """What is needed to repeat the run: settings, hashes, versions."""
    keys = ("command", "localsteer", "llama_cpp", "machine", "seconds")
    run = {key: getattr(results, key) for key in keys if getattr(results, key) is not None}
    parts = {
        "Run": run, "Model": results.model, "Base model": results.base, "Settings": results.settings,
        "Files (sha256)": results.files,
    }  # fmt: skip
    for title, facts in parts.items():
        if facts:
            rows = tuple((TableCell(str(name)), _fact(value)) for name, value in facts.items())
            yield Grid(("name", "value"), rows, title)
    if results.vectors:
        columns = ("vector", "settings", "sha256", "sha256 of its model")
        rows = tuple(
            (TableCell(name), TableCell(settings_text(vector) or NONE), *map(_hash, hashes))
            for name, vector in results.vectors.items()
            for hashes in [(vector.sha256, vector.source_sha256)]
        )
        yield Grid(columns, rows, "Vectors")


def _fact(value: Any) -> TableCell:
    """As cell, for values of any kind; never aligned to the right."""
    if isinstance(value, Mapping):
        return TableCell(", ".join(f"{name} {_fact(inner).text}" for name, inner in value.items()))
    if isinstance(value, int) and not isinstance(value, bool):
        return TableCell(str(value))  # a seed has no thousands
    if isinstance(value, (list, tuple)):
        return TableCell(", ".join(_fact(inner).text for inner in value))
    return TableCell(cell(value).text)


def _hash(digest: str | None) -> TableCell:
    return TableCell((digest or NONE)[:_SHORT_HASH])


def spans(text: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces, each with whether it is a name that stood between backticks."""
    for i, piece in enumerate(re.split(r"`([^`]+)`", text)):
        if piece:
            yield piece, i % 2 == 1


def slug(text: str) -> str:
    """For file names and anchors."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"
