"""One reply judged: does it follow the instruction, is it still a reply, does it speak of what was asked?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from localsteer.catalog import Instruction, Query
from localsteer.verify.quality import is_degenerate, repetition, subject_kept
from localsteer.verify.verdicts import verify

if TYPE_CHECKING:
    from localsteer.runtime.reply import Reply


@dataclass(frozen=True)
class Judged:
    """A reply with its verdicts; None if there is nothing to judge by.

    followed: the verifier passes AND the reply is not degenerate, in all conditions alike, since a loop of
    quotes that a lenient verifier accepts is not success. verified: only the verifier.
    """

    query: str
    subject: str | None
    text: str
    tokens: tuple[int, ...]
    verified: bool | None
    degenerate: str | None
    subject_kept: bool | None
    repetition: float

    @property
    def followed(self) -> bool | None:
        return None if self.verified is None else self.verified and self.degenerate is None

    @property
    def good(self) -> bool:
        """Whether the reply passes everything that can be judged."""
        return self.verified is not False and self.degenerate is None and self.subject_kept is not False

    def record(self) -> dict[str, object]:
        """The verdicts as JSON."""
        keys = ("query", "subject", "text", "followed", "verified", "degenerate", "subject_kept")
        return {key: getattr(self, key) for key in keys} | {"n_tokens": len(self.tokens)}


ENDLESS = "endless"  # a reason beside those of quality.py


def why_degenerate(reply: Reply, *, must_end: bool = False) -> str | None:
    """Why a reply is degenerate, or None. must_end: a reply that was cut at the limit is degenerate, because
    the limit leaves ample room."""
    return is_degenerate(reply.text) or (ENDLESS if must_end and reply.finish_reason == "length" else None)


def judge(instruction: Instruction, query: Query, reply: Reply, *, must_end: bool = False) -> Judged:
    """The reply with its verdicts. must_end: see `why_degenerate`.

    Raises CatalogError for an instruction whose verifier does not exist or lacks an argument.
    """
    verified = None
    if instruction.verifier is not None:
        kwargs = instruction.kwargs_for(query.text)
        verified = verify(instruction.verifier, reply.text, kwargs, prompt=query.text)
    return Judged(
        query=query.text,
        subject=query.subject,
        text=reply.text,
        tokens=tuple(reply.tokens),
        verified=verified,
        degenerate=why_degenerate(reply, must_end=must_end),
        subject_kept=None if query.subject is None else subject_kept(reply.text, query.subject),
        repetition=repetition(reply.text),
    )


def share(values: Sequence[bool | None]) -> float | None:
    """The share of true values among those that could be judged; None if none could."""
    judged = [value for value in values if value is not None]
    return sum(judged) / len(judged) if judged else None
