"""What an experiment found: a table with a row for each reply, and the figures of any part of it.

    rows.of("steered", "json").share       how many follow, with the interval
    rows.by("instruction")["json"]         the rows of one instruction, of each
    rows.of("both").minus(rows.of("instructed"))
    rows.of("steered").figures(plain=rows.of("none"))

A degenerate reply follows nothing, in every condition alike. Intervals are 95%, bootstrap over queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from msgspec import structs

from localsteer.catalog import Instruction
from localsteer.evaluate.cells import Cell, checks_of
from localsteer.evaluate.intervals import clustered
from localsteer.evaluate.page import (
    Accuracy,
    ByCondition,
    Facts,
    Figures,
    NamedSetting,
    Number,
    Share,
    SuiteReport,
)
from localsteer.runtime.reply import Reply
from localsteer.vector import ControlVector
from localsteer.verify.judge import share, why_degenerate
from localsteer.verify.quality import length_words, repetition, subject_kept
from localsteer.verify.verdicts import verify


@dataclass(frozen=True)
class Outcome:
    """One reply, judged. strict, loose: by IFEval's rules, false for a degenerate reply, None without a
    check. degenerate: why, or None. log_perplexity: natural, of the reply under the unsteered model after the
    base query; None for an empty reply, or where it was not asked for."""

    cell: Cell
    reply: Reply
    strict: bool | None
    loose: bool | None
    degenerate: str | None
    subject_kept: bool | None
    n_words: int
    repetition: float
    log_perplexity: float | None = None

    @property
    def good(self) -> bool:
        """Nothing that can be judged speaks against it."""
        return self.strict is not False and self.degenerate is None and self.subject_kept is not False


def judged(
    cell: Cell, reply: Reply, *, must_end: bool = False, log_perplexity: float | None = None
) -> Outcome:
    """must_end: a reply that was cut at max_tokens is degenerate.

    Raises CatalogError for a check whose verifier does not exist or lacks an argument."""
    degenerate = why_degenerate(reply, must_end=must_end)
    strict = loose = None
    if cell.checks:
        strict = degenerate is None and _passes(cell, reply.text, loose=False)
        # what passes strictly passes loosely: the reply itself is one of the eight variants
        loose = strict or (degenerate is None and _passes(cell, reply.text, loose=True))
    subject = cell.query.subject
    return Outcome(
        cell,
        reply,
        strict=strict,
        loose=loose,
        degenerate=degenerate,
        subject_kept=None if subject is None else subject_kept(reply.text, subject),
        n_words=length_words(reply.text),
        repetition=repetition(reply.text),
        log_perplexity=log_perplexity,
    )


def _passes(cell: Cell, text: str, *, loose: bool) -> bool:
    return all(
        verify(check.verifier, text, check.kwargs, prompt=cell.query.text, loose=loose)
        for check in cell.checks
    )


class OutcomesRecord(TypedDict):
    n: int
    followed: float | None
    subject_kept: float | None
    degenerate: float | None
    perplexity: float | None
    repetition: float | None


class Outcomes(tuple[Outcome, ...]):
    """A table, or a part of one. Shares are 0 to 1, None where nothing could be judged."""

    __slots__ = ()

    # -- parts ---------------------------------------------------------------------------------------

    def of(self, condition: str | None = None, instruction: str | None = None) -> Outcomes:
        """Those of a condition and of an instruction's label; None: of all."""
        return Outcomes(
            row
            for row in self
            if condition in (None, row.cell.condition) and instruction in (None, row.cell.instruction)
        )

    def by(self, *columns: str) -> dict[Any, Outcomes]:
        """Parts by a field of their cells, or by the tuple of several, in order of appearance."""
        parts: dict[Any, list[Outcome]] = {}
        for row in self:
            key = tuple(getattr(row.cell, column) for column in columns)
            parts.setdefault(key if len(columns) > 1 else key[0], []).append(row)
        return {key: Outcomes(part) for key, part in parts.items()}

    def judged_by(self, instruction: Instruction, *, must_end: bool) -> Outcomes:
        """The same replies, judged by one of the instructions that were asked for together."""
        return Outcomes(
            judged(
                replace(row.cell, checks=checks_of(instruction, row.cell.query)), row.reply, must_end=must_end
            )
            for row in self
        )

    # -- figures -------------------------------------------------------------------------------------

    @property
    def n(self) -> int:
        return len(self)

    @property
    def followed(self) -> float | None:
        return share([row.strict for row in self])

    @property
    def share(self) -> Share:
        """The same with its interval."""
        return self.accuracy("strict").share

    def shares(self, conditions: Sequence[str]) -> list[Share | None]:
        """A cell for each condition; None for one that is not here."""
        parts = self.by("condition")
        return [parts[name].share if name in parts else None for name in conditions]

    def accuracy(self, rule: str) -> Accuracy:
        """By the rule strict or loose."""
        by_query: dict[str, list[bool]] = {}
        for row in self:
            if (verdict := getattr(row, rule)) is not None:
                by_query.setdefault(row.cell.query.text, []).append(verdict)
        if not by_query:
            return Accuracy()
        sums, counts = list(map(sum, by_query.values())), list(map(len, by_query.values()))
        return Accuracy(sum(sums) / sum(counts), *clustered(sums, counts))

    def minus(self, others: Outcomes, rule: str = "strict") -> Share:
        """Accuracy of these minus that of others, with its interval over queries.

        Both hold the same queries for the same instructions, in whatever order: queries are drawn for both
        alike.
        """
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for sign, rows in ((1, self), (-1, others)):
            for row in rows:
                verdict, query = getattr(row, rule), row.cell.query.text
                if verdict is not None:
                    sums[query] = sums.get(query, 0.0) + sign * verdict
                    counts[query] = counts.get(query, 0) + 1
        if not sums:
            return Share(None)
        halves = [counts[query] / 2 for query in sums]
        return Share(sum(sums.values()) / sum(halves), *clustered(list(sums.values()), halves))

    @property
    def words(self) -> float | None:
        """Mean of the replies' words."""
        return mean([row.n_words for row in self])

    @property
    def repetition(self) -> float | None:
        return mean([row.repetition for row in self])

    @property
    def subject_kept(self) -> float | None:
        return share([row.subject_kept for row in self])

    @property
    def degenerate(self) -> float | None:
        return share([row.degenerate is not None for row in self])

    @property
    def perplexity(self) -> float | None:
        """Of the replies under the unsteered model after the base query. Its ratio to that of `none` tells
        how far they have left what the model would say; to follow an instruction costs some of it anyway."""
        return _exp(self._mean_log)

    @property
    def _mean_log(self) -> float | None:
        return mean([row.log_perplexity for row in self])

    def figures(self, plain: Outcomes | None = None) -> Figures:
        """What results.json holds of one instruction and condition, or of several together (`all`).

        plain: of the unsteered model for the same queries; the perplexity ratio is to theirs."""
        mean_log, plain_log = self._mean_log, plain._mean_log if plain else None
        known = mean_log is not None and plain_log is not None
        return Figures(
            n=self.n,
            strict=self.accuracy("strict"),
            loose=self.accuracy("loose"),
            quality={
                "perplexity": self.perplexity,
                "perplexity_ratio": _exp(mean_log - plain_log) if known else None,
                "repetition": self.repetition,
                "words": self.words,
                "degenerate": self.degenerate,
                "subject_kept": self.subject_kept,
            },
            settings=_settings(self),
        )

    def record(self) -> OutcomesRecord:
        """For JSON."""
        return {
            "n": self.n,
            "followed": self.followed,
            "subject_kept": self.subject_kept,
            "degenerate": self.degenerate,
            "perplexity": self.perplexity,
            "repetition": self.repetition,
        }


def mean(values: Iterable[Number]) -> float | None:
    """Of what is known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _exp(value: float | None) -> float | None:
    return None if value is None else math.exp(min(value, 700.0))


# --- a report ----------------------------------------------------------------------------------------------


def report(title: str, rows: Outcomes, conditions: Sequence[str], hashes: Mapping[str, str]) -> SuiteReport:
    """Figures of each instruction and condition, without sections. hashes: of vectors' files by their names.

    `none` is the unsteered reply that perplexities are compared with.
    """
    tables = {
        name: {
            condition: _hashed(part[condition].figures(part.get("none")), hashes)
            for condition in conditions
            if condition in part
        }
        for name, own in rows.by("instruction").items()
        for part in [own.by("condition")]
    }
    present = [name for name in conditions if any(name in table for table in tables.values())]
    return SuiteReport(title=title, conditions=present, instructions=tables, all=_all(rows, present))


def _all(rows: Outcomes, conditions: Sequence[str]) -> ByCondition:
    """Figures over all instructions that have the condition and a verdict: what no verifier judges (to be
    concise, to be verbose) may pull figures either way. `settings` differ, so there are none."""
    parts = rows.by("instruction", "condition")
    names = list(rows.by("instruction"))
    together = {}
    for condition in conditions:
        having = [name for name in names if any(row.cell.checks for row in parts.get((name, condition), ()))]
        if having:
            members, plain = (
                Outcomes(row for name in having for row in parts.get((name, each), ()))
                for each in (condition, "none")
            )
            together[condition] = structs.replace(members.figures(plain), settings=None)
    return together


def _hashed(figure: Figures, hashes: Mapping[str, str]) -> Figures:
    settings = figure.settings
    if settings is None:
        return figure
    if isinstance(settings, list):
        return structs.replace(figure, vector_sha256=[hashes.get(setting.name) for setting in settings])
    return structs.replace(figure, vector_sha256=hashes.get(settings.name))


def _settings(rows: Outcomes) -> NamedSetting | list[NamedSetting] | None:
    """How the vectors of these rows are applied: one, a list of several, or None without any."""
    vectors = list(dict.fromkeys(vector for row in rows for vector in row.cell.steer))
    settings = [NamedSetting(name=vector.name, **setting_of(vector)) for vector in vectors]
    return settings[0] if len(settings) == 1 else settings or None


def setting_of(vector: ControlVector) -> Facts:
    """The fields of `Applied`."""
    keys = ("positions", "mode", "strength")
    return {"layer": list(vector.layers), **{key: getattr(vector, key) for key in keys}}
