"""Which three instructions are put together: those named, or the usual ones that the catalogue has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from localsteer.catalog import Instruction
from localsteer.errors import CatalogError
from localsteer.evaluate.bench import Bench
from localsteer.evaluate.outcomes import Outcomes
from localsteer.evaluate.studies.common import StudyJob
from localsteer.vector import ControlVector
from localsteer.verify.judge import ENDLESS

INCLUDE = "include_word"
EXCLUDED = "exclude"  # stands for an instruction that excludes a word which plain replies use
LONG = ("verbose", "words_over")  # in place of about 100 words, as the catalogue has it
TRIPLES = (
    ("json", LONG[0], EXCLUDED),
    ("lowercase", "one_sentence", EXCLUDED),
    ("lowercase", "bullets", EXCLUDED),
    ("uppercase", "title", "one_sentence"),
    ("no_comma", "quotation", "lowercase"),
)


def triples_of(job: StudyJob, bench: Bench) -> tuple[list[tuple[Instruction, ...]], str]:
    if job.wanted is not None:
        if len(job.wanted) != 3:
            raise CatalogError(f"three instructions are put together, and {len(job.wanted)} are named")
        return [tuple(job.instructions(job.wanted))], ""
    plain = bench.plain(bench.validation, what="the model alone")
    excluded, share = _excluded(bench, plain)
    long = _long(job)
    triples = []
    for names in TRIPLES[: 1 if job.quick else None]:
        ids = [excluded if name == EXCLUDED else long if name == LONG[0] else name for name in names]
        if all(isinstance(each, Instruction) or each in job.catalog.instructions for each in ids):
            triples.append(
                tuple(each if isinstance(each, Instruction) else job.catalog.get(each) for each in ids)
            )
    if not triples:
        raise CatalogError(f"{job.catalog.source} has none of the usual triples: name three --instructions")
    least = long.kwargs.get("num_words")
    said = (
        f"The seed's case is about 100 words, JSON, without a given word. This model's plain replies have "
        f"{plain.words:.0f} words on average, so the length asked for here is at least {least} words "
        f"({long.id}). The word to avoid ({excluded.id}: "
        f"{', '.join(excluded.kwargs.get('forbidden_words', ()))}) is in {1 - share:.0%} of the plain "
        "replies."
    )
    return triples, said


def _long(job: StudyJob) -> Instruction:
    known = job.catalog.instructions
    if LONG[1] in known:
        return job.catalog.get(LONG[1], n=80)
    if LONG[0] in known:
        return job.catalog.get(LONG[0])
    raise CatalogError(f"{job.catalog.source} has none of {', '.join(LONG)}: name three --instructions")


def _excluded(bench: Bench, plain: Outcomes) -> tuple[Instruction, float]:
    """The instruction to exclude the word that plain replies hold most, and the share that lacks it."""
    known = [each for name, each in bench.catalog.instructions.items() if name.startswith(EXCLUDED)]
    filled = [each.fill() for each in known if set(each.open_slots) <= set(each.slots)]
    if not filled and known:
        texts = (row.reply.text for row in plain)
        words = Counter(word for text in texts for word in set(re.findall(r"[a-z]{5,}", text.lower())))
        filled = [known[0].fill(word=word) for word, _ in words.most_common(1)]
    if not filled:
        raise CatalogError(f"{bench.catalog.source} excludes no word: name three --instructions")
    shares = [(each, judged_by(plain, each).followed) for each in filled]
    return min(shares, key=lambda pair: pair[1])


def minus_of(bench: Bench, instructions: Sequence[Instruction]) -> dict[str, ControlVector]:
    """The include vector of each excluded word, where the catalogue can ask for any word."""
    include = bench.catalog.instructions.get(INCLUDE)
    words = {instruction.id: instruction.kwargs.get("forbidden_words", ()) for instruction in instructions}
    filled = {
        name: include.fill(word=forbidden[0])
        for name, forbidden in words.items()
        if include is not None and len(forbidden) == 1 and "word" in include.open_slots
    }
    raw = bench.raw(list(filled.values())) if filled else {}
    return {name: raw[each.id] for name, each in filled.items()}


def judged_by(rows: Outcomes, instruction: Instruction) -> Outcomes:
    """By one of the three: a reply without an end follows none of them either."""
    return Outcomes(
        judged
        for row in rows
        for judged in Outcomes([row]).judged_by(instruction, must_end=row.degenerate == ENDLESS)
    )
