"""What results.json holds, as types: a page's tables and plots, a suite's figures, a whole run.

    page = Results(format=1, title="Two runs", sections=[Section("Words", tables=[Table(("a",), [[1]])])])
    plain(page)               # as JSON has it
    loaded(json.loads(text))  # and back

The types are the validator: whatever is loaded is either a `Results` or one line that names the place and
what is wrong there. `__post_init__` checks what a type can't say. numpy and the engine are not needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from itertools import chain
from typing import Annotated, Any, TypeAlias, TypedDict

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from localsteer.errors import LocalsteerError

FORMAT = 1
Number: TypeAlias = int | float | None
Facts: TypeAlias = dict[str, Any]  # settings, a model's header, hashes: shown by name, whatever they are


class ModelFacts(TypedDict, total=False):
    """Which model: its name and its file's sha256, what its header says."""

    name: str
    sha256: str
    architecture: str
    quantization: str | None
    n_layer: int
    n_embd: int


class Share(Struct, frozen=True, omit_defaults=True):
    """0 to 1, or a difference of two; None where nothing could be judged. low, high: its 95% interval."""

    share: Number
    low: Number = None
    high: Number = None


Point: TypeAlias = Share | int | float | None
Label: TypeAlias = str | int | float
Value: TypeAlias = Share | bool | int | float | str | list[bool | int | float | str | None] | None


class Table(Struct, frozen=True, omit_defaults=True):
    """rows: each as long as `columns`."""

    columns: list[Label]
    rows: list[list[Value]]
    title: str | None = ""

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            _same_length(f"rows[{i}]", row, self.columns, "the columns are")


class Plot(Struct, frozen=True, tag_field="kind"):
    title: str | None = ""
    x_label: str | None = ""
    y_label: str | None = ""


class Series(Plot, frozen=True, kw_only=True):
    """series: by name, a point for each of `x`."""

    x: list[Label]
    series: dict[str, list[Point]]

    def __post_init__(self) -> None:
        for name, points in self.series.items():
            _same_length(f"series.{name}", points, self.x, "x is")

    def points(self) -> list[Point]:
        return list(chain.from_iterable(self.series.values()))


class Lines(Series, frozen=True, tag="lines"):
    """A curve for each series."""


class Bars(Series, frozen=True, tag="bars"):
    """A group of bars for each of `x`."""


class Heatmap(Plot, frozen=True, kw_only=True, tag="heatmap"):
    """values: a list for each of `rows`, a point for each of `columns`."""

    rows: list[Label]
    columns: list[Label]
    values: list[list[Point]]

    def __post_init__(self) -> None:
        _same_length("values", self.values, self.rows, "the rows are")
        for i, row in enumerate(self.values):
            _same_length(f"values[{i}]", row, self.columns, "the columns are")

    def points(self) -> list[Point]:
        return list(chain.from_iterable(self.values))


AnyPlot: TypeAlias = Lines | Bars | Heatmap


class Section(Struct, frozen=True):
    """text: paragraphs with empty lines between them; `names` stand between backticks there and in titles."""

    title: str | None = ""
    text: str | None = ""
    tables: list[Table] = []
    plots: list[AnyPlot] = []


class Accuracy(Struct, frozen=True):
    """The share of replies that follow by one rule, with its 95% interval; None where nothing was judged."""

    accuracy: Number = None
    low: Number = None
    high: Number = None

    @property
    def share(self) -> Share:
        return Share(self.accuracy, self.low, self.high)


class Applied(Struct, frozen=True, kw_only=True):
    """Where and how a vector is applied."""

    layer: list[int] | int | None = None
    positions: str | None = None
    mode: str | None = None
    strength: Number = None


class NamedSetting(Applied, frozen=True, kw_only=True):
    name: str | None = None


class VectorRecord(Applied, frozen=True, kw_only=True):
    """sha256: of its file. source_sha256: of the model that it was made from. given: not made by this run."""

    sha256: str | None = None
    source_sha256: str | None = None
    given: bool | None = None


class Figures(Struct, frozen=True, kw_only=True):
    """What was measured of one instruction and condition, or of several instructions together.

    quality: perplexity, perplexity_ratio, repetition, words, degenerate, subject_kept. settings: of the
    vector, of several as a list, None without any.
    """

    n: Number = None
    strict: Accuracy | None = None
    loose: Accuracy | None = None
    quality: dict[str, Number] | None = None
    settings: NamedSetting | list[NamedSetting] | None = None
    vector_sha256: str | list[str | None] | None = None

    def rule(self, name: str) -> Accuracy:
        return getattr(self, name) or Accuracy()

    def measure(self, name: str) -> Number:
        return (self.quality or {}).get(name)


ByCondition: TypeAlias = dict[str, Figures]  # by condition


class SuiteReport(Struct, frozen=True, kw_only=True):
    """instructions: figures by instruction and condition. all: over the instructions, by condition."""

    title: str | None = ""
    summary: str | UnsetType | None = UNSET
    conditions: list[str] = []
    instructions: dict[str, ByCondition] = {}
    all: ByCondition | None = {}
    sections: list[Section] = []


class StudyReport(Struct, frozen=True, kw_only=True):
    """What a study found. figures: its numbers, each study's own."""

    model: Facts
    figures: Any
    sections: list[Section]
    settings: Facts = {}


class Results(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One results.json: of an evaluation (suites), a study (study, sections, figures), or a comparison."""

    format: Annotated[int, Meta(ge=1)]
    study: str | None = None
    title: str | None = None
    localsteer: str | None = None
    llama_cpp: str | None = None
    machine: str | None = None
    command: str | None = None
    seconds: Number = None
    model: Facts | None = None
    base: Facts | UnsetType | None = UNSET
    settings: Facts | None = None
    files: Facts | None = None
    vectors: dict[str, VectorRecord] | None = None
    suites: dict[str, SuiteReport] | UnsetType = UNSET
    sections: list[Section] = []
    figures: Any = UNSET


# --- to JSON and back --------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """As JSON has it: tables of names and values, lists, and numbers of Python's own, not numpy's."""
    return msgspec.to_builtins(value, enc_hook=_of_numpy)


def loaded(content: Any) -> Results:
    """Raises LocalsteerError for what is no results.json, is of a newer format, or is broken somewhere."""
    if isinstance(content, Results):
        return content
    version = content.get("format") if isinstance(content, Mapping) else None
    if isinstance(version, int) and not isinstance(version, bool) and version > FORMAT:
        raise LocalsteerError(
            f"these results are of format {version}, this localsteer shows format {FORMAT}: "
            "update localsteer."
        )
    return _converted(content)


def _converted(content: Any) -> Results:
    try:
        return msgspec.convert(content, Results)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `")
        where = _named(content, str(error), path.rstrip("`"))
    except RecursionError:
        what, where = "it is nested too deeply", "the whole"
    why = "".join(char if char.isprintable() else "\ufffd" for char in f"{where}: {what}")
    raise LocalsteerError(
        f"these results can't be shown ({why}): make them again with localsteer eval."
    ) from None


def _named(content: Any, error: str, path: str) -> str:
    """The place in words. msgspec writes `[...]` for an entry of a table of names: the one that is wrong is
    the one that makes the same error with the others taken away."""
    whole = deepcopy(content)
    place, words = whole, []
    for name, index, unknown in re.findall(r"\.(\w+)|\[(\d+)\]|(\[\.\.\.\])", path):
        if unknown:
            name = _culprit(whole, place, error)
        words.append(f"[{index}]" if index else f".{name}")
        place = place[int(index)] if index else place.get(name)
    return "".join(words).lstrip(".") or "the whole"


def _culprit(whole: Any, table: Facts, error: str) -> str:
    entries = dict(table)
    for name, entry in entries.items():
        table.clear()
        table[name] = entry
        try:
            msgspec.convert(whole, Results)
        except msgspec.ValidationError as again:
            if str(again) == error:
                return name
    return next(reversed(entries))


def _of_numpy(value: Any) -> Any:
    """numpy's numbers and arrays as Python's own."""
    return value.tolist()


def _same_length(what: str, values: Any, others: Any, why: str) -> None:
    if len(values) != len(others):
        raise ValueError(f"{what} must be {len(others)} long, as {why}")
