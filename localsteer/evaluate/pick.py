"""Quick choice of block, positions and strength for one instruction: all settings on a few queries, then the
best of them on more (successive halving), many settings in one batch.

    picked = pick(engine, vector, instruction, queries)
    reply = engine.generate("Tell me about foxes.", steer=[picked.vector])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from localsteer.catalog import Instruction, Query
from localsteer.errors import PlanError
from localsteer.evaluate.best_first import best_first, most_runs
from localsteer.evaluate.judge import Judged, judge, log_perplexities, perplexity, share
from localsteer.generate import GREEDY
from localsteer.plan import Plan
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.generate import Reply

# Up to this depth every block is tried; deeper models get the paper's grid (section 3.1).
FEW_BLOCKS = 12
POSITIONS = ("prompt", "last", "all")
STRENGTHS = (1.0,)
MAX_TOKENS = 128


class Round(NamedTuple):
    """keep: how many settings come into this round. n_queries: how many queries each has seen by its end."""

    keep: int
    n_queries: int


# The first round sees every setting; the last is to tell a rare degenerate reply, which twenty may not hold.
ROUNDS = (Round(10**6, 2), Round(8, 8), Round(4, 40))


@dataclass(frozen=True)
class Setting:
    """What a vector is applied with."""

    layer: int
    positions: str
    strength: float
    mode: str = "project"

    def of(self, vector: ControlVector) -> ControlVector:
        return vector.at(layer=self.layer, positions=self.positions, strength=self.strength, mode=self.mode)


@dataclass
class Trial:
    """One setting, or none (the model alone), and how its replies were.

    score: share of good replies. strict: one degenerate reply makes it 0 (the paper's rule, section 3.1).
    """

    setting: Setting | None
    strict: bool = False
    replies: list[Judged] = field(default_factory=list)
    perplexity: float | None = None

    @property
    def n_degenerate(self) -> int:
        return sum(reply.degenerate is not None for reply in self.replies)

    @property
    def score(self) -> float:
        if not self.replies or (self.strict and self.n_degenerate):
            return 0.0
        return sum(reply.good for reply in self.replies) / len(self.replies)

    def row(self) -> dict[str, object]:
        """For JSON: the setting's fields are None for the model alone."""
        setting = asdict(self.setting) if self.setting else dict.fromkeys(Setting.__dataclass_fields__)
        return setting | {
            "n": len(self.replies),
            "score": self.score,
            "followed": share([reply.followed for reply in self.replies]),
            "degenerate": share([reply.degenerate is not None for reply in self.replies]),
            "subject_kept": share([reply.subject_kept for reply in self.replies]),
            "perplexity": self.perplexity,
        }


@dataclass(frozen=True)
class Pick:
    """vector: with the chosen settings applied; strength 0 when `setting` is None, that is, when nothing did
    better than the model alone. table: every setting that was tried, the best first. notice: what the user
    should be told, or empty."""

    vector: ControlVector
    setting: Setting | None
    table: list[dict[str, object]]
    notice: str = ""


def pick(
    engine: Engine,
    vector: ControlVector,
    instruction: Instruction,
    queries: Sequence[Query],
    *,
    blocks: Iterable[int] | None = None,
    positions: Sequence[str] = POSITIONS,
    strengths: Sequence[float] = STRENGTHS,
    mode: str | Sequence[str] = "project",
    rounds: Sequence[Round] = ROUNDS,
    max_tokens: int = MAX_TOKENS,
    must_end: bool = False,
    plain: Sequence[Reply] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Pick:
    """The setting whose replies to `queries` (validation ones) are most often good; without a verifier the
    paper's default, because nothing here could tell whether an instruction is followed.

    Good: the verifier passes, the reply is not degenerate, and it names the query's subject. Among equals the
    replies that the unsteered model finds likeliest win, then the lowest block; the model alone wins against
    settings that are no better. blocks: 0-based, `default_blocks` if not given. mode: one, or several to
    choose from. The rest as `search` has it. Raises PlanError when nothing is left to try.
    """
    if instruction.verifier is None:
        return _paper_default(vector, mode if isinstance(mode, str) else mode[0])
    if not queries:
        raise PlanError(f"no validation queries to choose settings for {instruction.id} with.")
    settings = settings_of(vector, blocks, positions, strengths, mode)
    trials = search(
        engine,
        vector,
        instruction,
        queries,
        settings,
        rounds=rounds,
        max_tokens=max_tokens,
        must_end=must_end,
        plain=plain,
        on_progress=on_progress,
    )
    return _picked(vector, instruction, trials)


def search(
    engine: Engine,
    vector: ControlVector,
    instruction: Instruction,
    queries: Sequence[Query],
    settings: Sequence[Setting],
    *,
    rounds: Sequence[Round] | None,
    max_tokens: int,
    must_end: bool = False,
    plain: Sequence[Reply] | None = None,
    strict: bool = False,
    guard: Callable[[Trial], None] | None = None,
    order: Callable[[Trial], tuple[object, ...]] | None = None,
    call_size: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Trial]:
    """The model alone and every setting, in their final order, many of them in one batch.

    One round of all settings is the full search. rounds None is best first: a setting that can hardly win is
    not asked on, some are not asked at all, and those that were finished come first. must_end: as in `judge`.
    plain: replies of the model alone to `queries`, where they are known. strict: a degenerate reply makes a
    setting worth nothing. guard: may mark replies of a setting that has done better than the model alone as
    degenerate, once it is finished. order: sort key of the finished ones, `likeliest_first` by default; best
    first needs one by which of equals the lower block wins. call_size: replies in one call of the engine at
    most, which is what a journal repeats after a kill. on_progress: called with (replies, of how many at
    most).
    """
    trials = [Trial(setting, strict) for setting in (None, *settings)]
    total = most_asked(len(trials), len(queries), rounds) - (len(plain) if plain else 0)
    advance = Advance(max(1, total), on_progress)
    plans = [None, *(Plan.from_vectors([setting.of(vector)]) for setting in settings)]

    def ask(cells: Sequence[tuple[int, int]]) -> list[Reply]:
        replies = engine.generate_batch(
            [queries[j].text for _, j in cells],
            steer=[plans[i] for i, _ in cells],
            max_tokens=max_tokens,
            sampling=GREEDY,
            on_progress=advance.within,
        )
        advance.by(len(cells))
        return replies

    def run(cells: Sequence[tuple[int, int]]) -> None:
        found = {(0, j): plain[j] for i, j in cells if i == 0} if plain else {}
        asked = [cell for cell in cells if cell not in found]
        size = call_size or max(1, len(asked))
        for start in range(0, len(asked), size):
            part = asked[start : start + size]
            found |= zip(part, ask(part), strict=True)
        for i, j in cells:
            trials[i].replies.append(judge(instruction, queries[j], found[i, j], must_end=must_end))

    def settle(live: Sequence[int]) -> list[int]:
        _settle_ties(engine, [trials[i] for i in live])
        return sorted(live, key=lambda i: (order or likeliest_first)(trials[i]))

    def watch(finished: Iterable[int]) -> None:
        for i in finished:
            if guard and i != 0 and trials[i].score > trials[0].score:
                guard(trials[i])

    def rank(live: Sequence[int], keep: int) -> list[int]:
        if keep > 1:
            return spread_ties(live, [trials[i].score for i in live], keep)
        watch(live)
        return settle(live)

    def run_and_watch(cells: Sequence[tuple[int, int]]) -> None:
        run(cells)
        watch(i for i in sorted({i for i, _ in cells}) if len(trials[i].replies) == len(queries))

    def failures(i: int) -> int:
        if strict and trials[i].n_degenerate:
            return len(queries)
        return sum(not reply.good for reply in trials[i].replies)

    def level(i: int) -> int:
        return -1 if i == 0 else trials[i].setting.layer

    if rounds is None:
        finished = settle(best_first(len(trials), len(queries), run_and_watch, failures, level))
        rest = [i for i in range(len(trials)) if i not in finished]
        found = finished + sorted(rest, key=lambda i: (-trials[i].score, -len(trials[i].replies)))
    else:
        found = halve(len(trials), len(queries), rounds, run, rank)
    advance.end()
    return [trials[i] for i in found]


class Advance:
    """Replies done over several calls of the engine."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None] | None) -> None:
        self._done, self._total, self._on_progress = 0, total, on_progress

    def within(self, done: int, _of: int) -> None:
        if self._on_progress:
            self._on_progress(min(self._done + done, self._total), self._total)

    def by(self, n: int) -> None:
        self._done += n
        self.within(0, 0)

    def end(self) -> None:
        self._done = self._total
        self.within(0, 0)


def halve(
    n_candidates: int,
    n_queries: int,
    rounds: Sequence[Round],
    run: Callable[[Sequence[tuple[int, int]]], None],
    rank: Callable[[Sequence[int], int], list[int]],
) -> list[int]:
    """Successive halving: candidates in their final order, those that stayed longest first.

    run: tries (candidate, query) pairs, each once. rank: orders candidates that were tried on the same
    queries, the best first; its second argument is how many of them matter from here on. Candidate 0 (the
    model alone) stays to the end: what wins is compared with it.
    """
    live, dropped = list(range(n_candidates)), []
    done = 0
    keeps = [keep for keep, _ in rounds[1:]] + [1]
    for (keep, until), next_keep in zip(rounds, keeps, strict=True):
        kept = [i for i in live if i != 0][:keep]
        dropped = [i for i in live if i != 0 and i not in kept] + dropped
        live = [0, *kept]
        until = min(until, n_queries)
        cells = [(i, j) for i in live for j in range(done, until)]
        if cells:
            run(cells)
        done = max(done, until)
        live = rank(live, next_keep)
    return live + dropped


def runs_of(n_candidates: int, n_queries: int, rounds: Sequence[Round]) -> int:
    """How many (candidate, query) pairs `halve` tries at most; candidate 0 is one of the candidates."""
    runs, live, done = 0, n_candidates, 0
    for keep, until in rounds:
        live, until = min(live, keep + 1), min(until, n_queries)
        runs += live * max(0, until - done)
        done = max(done, until)
    return runs


def most_asked(n_candidates: int, n_queries: int, rounds: Sequence[Round] | None) -> int:
    """How many replies `search` asks for at most, those of the model alone among them."""
    if rounds is None:
        return most_runs(n_candidates, n_queries)
    return runs_of(n_candidates, n_queries, rounds)


def settings_of(
    vector: ControlVector,
    blocks: Iterable[int] | None = None,
    positions: Sequence[str] = POSITIONS,
    strengths: Sequence[float] = STRENGTHS,
    mode: str | Sequence[str] = "project",
) -> list[Setting]:
    """Every combination, in order of blocks; blocks without a direction are left out."""
    wanted = default_blocks(vector.n_layer) if blocks is None else sorted(set(blocks))
    usable = [layer for layer in wanted if layer in vector.blocks]
    modes = (mode,) if isinstance(mode, str) else mode
    settings = [Setting(*values) for values in product(usable, positions, strengths, modes)]
    if not settings:
        raise PlanError(f"{vector.label} has no direction at any of the blocks to choose from.")
    return settings


def default_blocks(n_layer: int) -> range:
    """All blocks of a shallow model, the paper's grid in a deep one."""
    return range(n_layer) if n_layer <= FEW_BLOCKS else range(n_layer // 5, n_layer, 2)


def middle_blocks(n_layer: int) -> range:
    """The blocks from 25% to 75% of the depth: 2 to 5 of 8."""
    return range(-(-n_layer // 4), 3 * n_layer // 4)


def _paper_default(vector: ControlVector, mode: str) -> Pick:
    middle = vector.n_layer // 2
    layer = min(vector.blocks, key=lambda il: (abs(il - middle), il), default=None)
    if layer is None:
        raise PlanError(f"{vector.label} has no direction at any block.")
    setting = Setting(layer, "all", 1.0, mode)
    notice = (
        f"{vector.label} has no verifier, so nothing tells whether a reply follows it: block {layer}, all "
        f"positions and strength 1 are the paper's default. Try others with --layer, --positions, --strength."
    )
    return Pick(setting.of(vector), setting, [], notice)


def spread_ties(live: Sequence[int], scores: Sequence[float], keep: int) -> list[int]:
    """Candidates by score; of those that tie for the last of `keep` places, some at equal distances first.

    After few queries many settings are equal. The likeliest replies would be a bad guide then: a setting that
    hardly steers is the likeliest of all.
    """
    rivals = sorted((i for i in live if i != 0), key=lambda i: (-scores[live.index(i)], i))
    if len(rivals) > keep:
        last = scores[live.index(rivals[keep - 1])]
        above = [i for i in rivals if scores[live.index(i)] > last]
        tied = [i for i in rivals if scores[live.index(i)] == last]
        places = keep - len(above)
        first = [tied[k * len(tied) // places] for k in range(places)]
        rivals = [*above, *first, *(i for i in rivals if i not in {*above, *first})]
    return [0, *rivals]


def _settle_ties(engine: Engine, trials: Sequence[Trial]) -> None:
    """Perplexities of the settings that share the best score; nothing else needs them."""
    best = max(trial.score for trial in trials)
    tied = [trial for trial in trials if trial.setting and trial.score == best > 0]
    if len(tied) < 2 or all(trial.perplexity is not None for trial in tied):
        return
    logs = iter(log_perplexities(engine, [reply for trial in tied for reply in trial.replies]))
    for trial in tied:
        trial.perplexity = perplexity([next(logs) for _ in trial.replies])


def likeliest_first(trial: Trial) -> tuple[float, bool, float, int]:
    """Sort key: score, the model alone before its equals, then perplexity, then the lowest block."""
    if trial.setting is None:
        return (-trial.score, False, 0.0, 0)
    unknown = float("inf") if trial.perplexity is None else trial.perplexity
    return (-trial.score, True, unknown, trial.setting.layer)


def _picked(vector: ControlVector, instruction: Instruction, trials: Sequence[Trial]) -> Pick:
    table = [trial.row() for trial in trials]
    best = trials[0]
    if best.setting is not None:
        return Pick(best.setting.of(vector), best.setting, table)
    notice = (
        f"no setting made the model follow {instruction.id} more often than it does unsteered "
        f"({best.score:.0%}): nothing is applied."
    )
    return Pick(vector.at(strength=0.0), None, table, notice)
