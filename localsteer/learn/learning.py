"""Learning as a whole: examples, the steps, and a check by generation in the engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from localsteer.catalog import Instruction, Query, spread
from localsteer.errors import LocalsteerError
from localsteer.extract import origin_of
from localsteer.extract.gguf_backend import GgufBackend
from localsteer.tune.check import Check, Trial
from localsteer.tune.record import Choice, TuningRecord
from localsteer.tune.setting import Setting, layers_in_words, layers_of
from localsteer.tune.targets import Told
from localsteer.vector import ControlVector
from localsteer.verify import can_rewrite

from . import examples as gathering
from .kept import Kept
from .training import MICRO_BATCH, Prepared, Recipe, Training, is_exact, prepare
from .weights import Weights, check_memory, fast_dtype

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.runtime.reply import Reply

    from .examples import Example
    from .gate import Learned

METHOD = "learned by likelihood"
N_EXAMPLES = 48
N_HELD_OUT = 8
N_CHECKED = 12  # validation queries of the check
N_SCORED = 16  # examples whose probability says how improbable a good reply may be
# tokens of a reply in the check: a form that must be closed (JSON) needs room
MAX_TOKENS = gathering.MAX_TOKENS + 64
DEPTHS = (0.28, 0.48, 0.65, 0.82)  # of the layers that are edited together
RACE_DEPTHS = (0.65, 0.82)  # of those that race
RACE_STEPS = 8
EVERY = 5  # steps between two looks at the held-out loss
PATIENCE = 4  # the steps end after this many looks without improvement
# strengths that are checked: a vector learned by likelihood is sometimes a little too weak
STRENGTHS = (1.0, 1.25)

DEFAULT = Recipe()

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Look:
    """A point of the loss curve, in nats per token."""

    step: int
    loss: float
    held_out: float


@dataclass(frozen=True)
class Lesson:
    """vector: with its settings, and the record as provenance["validation"]. curve: the loss on the layers
    that won. helps: whether the check found the vector better than the plain model."""

    vector: ControlVector
    curve: tuple[Look, ...]
    record: TuningRecord

    @property
    def helps(self) -> bool:
        return self.vector.strength != 0


def learn(
    engine: Engine,
    instruction: Instruction,
    queries: Sequence[Query],
    validation: Sequence[Query],
    recipe: Recipe = DEFAULT,
    *,
    examples: Sequence[Example] | None = None,
    checkpoint: str | None = None,
    n_threads: int | None = None,
    kept: Kept | None = None,
    report: Report | None = None,
) -> Lesson:
    """Learn a vector of one instruction for the engine's model.

    queries: for the examples, unless `examples` are given. validation: queries for the check. checkpoint: its
    weights are used instead of the GGUF's. kept: examples and steps of a run that was stopped.

    Ctrl-C ends the steps and keeps the best so far. Raises LocalsteerError for what can't be learned.
    """
    report = report or (lambda _what, _done, _total: None)
    started = time.perf_counter()
    kept = kept or Kept(None, "")
    together = examples is not None if recipe.together is None else recipe.together
    candidates = layers_to_try(recipe.layers, engine.model.n_layer, together=together)
    # checked before the replies, which take a while; prompts and replies together are seldom longer
    check_memory(engine, fast_dtype(), MICRO_BATCH * MAX_TOKENS)
    if examples is None:
        examples = kept.examples() or gathering.of_instruction(
            engine,
            instruction,
            queries[:N_EXAMPLES],
            seed=recipe.seed,
            report=report,
            plain=kept.plain.of,
        )
        kept.keep_examples(examples)
    learning = _Learning(engine, list(examples), checkpoint, n_threads, kept, report)
    # nothing judges the user's replies, and it is not known how they would have to be rewritten
    judged = examples[0].source != "given" and instruction.verifier is not None
    try:
        stopped = False
        learning.race(candidates, recipe)
        _take_steps(learning, instruction, queries[:N_EXAMPLES], recipe, judged)
    except KeyboardInterrupt:
        if learning.training is None or not math.isfinite(learning.training.best):
            raise
        stopped = True
    training = learning.training
    vector = as_vector(engine, instruction, queries, training.learned(), recipe)
    report("checking by generation", 0, 0)
    check = _check_of(engine, vector, instruction, spread(validation, N_CHECKED), examples, report)
    plain = kept.plain.of(engine, [query.text for query in check.queries], MAX_TOKENS)
    vector, record = _checked(check, vector, instruction, plain)
    record |= {
        "search": "learned",
        "examples": {"n": len(examples), "source": examples[0].source},
        "steps": learning.n_steps,
        "loss": round(training.best, 4),
        "layers_raced": [list(layers) for layers in candidates],
        "seconds": round(time.perf_counter() - started, 1),
        "stopped": stopped,
        "seed": recipe.seed,
    }
    vector = replace(vector, provenance={**vector.provenance, "validation": record})
    kept.forget()
    return Lesson(vector, tuple(learning.curve), record)


def _take_steps(
    learning: _Learning, instruction: Instruction, queries: Sequence[Query], recipe: Recipe, judged: bool
) -> None:
    """Half of them, then all, then on the model's own replies: until it does what the instruction says."""
    for until in sorted({-(-recipe.n_steps // 2), recipe.n_steps}):
        learning.steps(recipe.n_steps, until)
        if judged and learning.does(instruction, queries, recipe):
            return
    if judged and can_rewrite(instruction.verifier):
        learning.own_steps(instruction, queries, recipe)


class _Learning:
    """The steps of a run: on the examples, then on the model's replies with what it has learned by then.

    training: that of the latest steps. curve: of all steps, on the layers that won.
    """

    def __init__(
        self,
        engine: Engine,
        examples: list[Example],
        checkpoint: str | None,
        n_threads: int | None,
        kept: Kept,
        report: Report,
    ) -> None:
        self._engine, self._kept, self._report = engine, kept, report
        n_tokens = MICRO_BATCH * max(len(example.tokens) for example in examples)
        report("loading the weights", 0, 0)
        self._weights = Weights.load(engine, checkpoint, n_tokens=n_tokens, n_threads=n_threads)
        # with few examples, none can be held out: they are then learned by heart to some degree
        n_held = min(N_HELD_OUT, len(examples) // 4)
        self._examples, self._held_out = examples[n_held:], examples[:n_held] or examples
        self._state = kept.state() or {}
        self.curve = [Look(*look) for look in self._state.get("curve", ())]
        self.training: Training | None = None
        self._first: Training | None = None  # once the steps on the model's own replies have begun

    @property
    def n_steps(self) -> int:
        return sum(training.step for training in (self._first, self.training) if training is not None)

    def race(self, candidates: Sequence[tuple[int, ...]], recipe: Recipe) -> None:
        """Race sets of layers, and keep the one with the lowest held-out loss after a few steps."""
        candidates = [tuple(self._state["layers"])] if self._state else candidates
        layers = sorted({layer for candidate in candidates for layer in candidate})
        self._own = self._prepared(self._examples, layers)
        self._held = self._prepared(self._held_out, layers)
        lowest = {candidate[0] for candidate in candidates}
        if not all(is_exact(self._weights, layer, self._own[0]) for layer in lowest):
            raise LocalsteerError(
                "layers of this model take more than the output of those below (keys and values, "
                "for instance), "
                "so they can't be run from the middle on: use a model of another architecture."
            )
        runners = [Training(self._weights, some, self._own, self._held, recipe) for some in candidates]
        if self._state:
            runners[0].restore(self._state["first"] or self._state["training"])
        elif len(runners) > 1:
            for done, runner in enumerate(runners):
                self._report(f"racing {layers_in_words(runner.layers)}", done, len(runners))
                runner.run(RACE_STEPS)
                runner.look()
        self.training = min(runners, key=lambda runner: runner.best)

    def steps(self, n_steps: int, until: int) -> None:
        """Take steps, at most n_steps in all; returns at the first look from step `until` on."""
        training, before = self.training, self._first.step if self._first else 0
        while training.step < until and training.stale < PATIENCE:
            training.run(min(EVERY, n_steps - training.step))
            training.look()
            self.curve.append(Look(before + training.step, training.loss, training.held))
            what = "its own replies" if self._first else "the examples"
            self._report(
                f"learning at {layers_in_words(training.layers)} from {what}, loss {training.loss:.2f}, held "
                f"out {training.held:.2f}",
                training.step,
                n_steps,
            )
            self._kept.keep_state(
                {
                    "layers": training.layers,
                    "first": self._first and self._first.state(),
                    "training": training.state(),
                    "curve": [(look.step, look.loss, look.held_out) for look in self.curve],
                }
            )

    def does(self, instruction: Instruction, queries: Sequence[Query], recipe: Recipe) -> bool:
        """Whether the quantized model now follows in every reply that it is asked for here."""
        if self._state.get("first"):  # it was asked before: otherwise the second round would not have begun
            return False
        self._report("replies under what was learned", 0, 0)
        vector = self._vector(instruction, queries, recipe)
        return gathering.all_follow(self._engine, instruction, queries, vector)

    def _vector(self, instruction: Instruction, queries: Sequence[Query], recipe: Recipe) -> ControlVector:
        return as_vector(self._engine, instruction, queries, self.training.learned(), recipe)

    def own_steps(self, instruction: Instruction, queries: Sequence[Query], recipe: Recipe) -> None:
        """Take half as many steps, on the model's current replies beside the examples: learning only from
        rewritten plain replies, it would never see where its own go wrong."""
        first = self.training
        own = self._kept.examples(own=True)
        if not own:
            vector = self._vector(instruction, queries, recipe)
            own = gathering.of_steered(
                self._engine, instruction, queries, vector, seed=recipe.seed, report=self._report
            )
            self._kept.keep_examples(own, own=True)
        if len(own) < gathering.FEWEST:
            return
        prepared = self._prepared(own, first.layers)
        half = max(1, min(N_HELD_OUT, len(own) // 4) // 2)
        recipe = replace(recipe, rate=recipe.rate / 2, n_steps=recipe.n_steps // 2, seed=recipe.seed + 1)
        training = Training(
            self._weights,
            first.layers,
            [*self._own, *prepared[half:]],
            [*self._held[:half], *prepared[:half]],
            recipe,
            first.best_gates(),
        )
        if self._state.get("first"):
            training.restore(self._state["training"])
        else:
            training.look()
        self._first, self.training = first, training
        self.steps(recipe.n_steps, recipe.n_steps)

    def _prepared(self, examples: Sequence[Example], layers: Sequence[int]) -> list[Prepared]:
        return prepare(
            self._weights,
            examples,
            layers,
            lambda done, total: self._report("running the plain model on the examples", done, total),
        )


def layers_to_try(layers: Sequence[int] | None, n_layer: int, *, together: bool) -> list[tuple[int, ...]]:
    """Sets of layers that race; one set if they are edited together. The last layer can't be edited, since
    nothing is computed above it."""
    depths = DEPTHS if together else RACE_DEPTHS
    usual = {min(n_layer - 2, max(0, round(depth * (n_layer - 1)))) for depth in depths}
    chosen = sorted(usual if layers is None else set(layers))
    for layer in chosen:
        if not 0 <= layer < n_layer - 1:
            raise LocalsteerError(f"a vector can't be learned at layer {layer}: choose 0 to {n_layer - 2}.")
    return [tuple(chosen)] if together else [(layer,) for layer in chosen]


def as_vector(
    engine: Engine,
    instruction: Instruction,
    queries: Sequence[Query],
    learned: Mapping[int, Learned],
    recipe: Recipe,
) -> ControlVector:
    """The vector of what was learned, by layer: gates, or constants in mode `add`. queries: some of those it
    was learned with."""
    prompts = [query.text for query in queries[:2]]
    n_layer = engine.model.n_layer
    settings = {
        "name": instruction.id,
        "positions": recipe.positions,
        "provenance": origin_of(GgufBackend(engine), instruction, prompts, method=METHOD),
    }
    if not recipe.constant:
        return ControlVector.from_gates(
            {layer: (one.reader, one.bias, one.writer, one.mean) for layer, one in learned.items()},
            n_layer=n_layer,
            **settings,
        )
    directions = np.zeros((n_layer, engine.model.n_embd), np.float32)
    for layer, one in learned.items():
        directions[layer] = one.mean * one.writer
    return ControlVector(directions, None, None, None, None, tuple(learned), mode="add", **settings)


def _check_of(
    engine: Engine,
    vector: ControlVector,
    instruction: Instruction,
    queries: Sequence[Query],
    examples: Sequence[Example],
    report: Report,
) -> Check:
    if instruction.verifier is None:  # a manner of one's own need not name what was asked about
        queries = [Query(query.text) for query in queries]
    own = [(example.prompt, example.reply) for example in examples[:N_SCORED]]
    return Check(
        engine,
        vector,
        instruction,
        queries,
        max_tokens=MAX_TOKENS,
        on_reply=lambda done: report("checking by generation", done, 0),
        surprising=-float(np.mean(engine.score(own))),
    )


def _checked(
    check: Check, vector: ControlVector, instruction: Instruction, plain: Sequence[Reply]
) -> tuple[ControlVector, TuningRecord]:
    """The vector at the strength whose replies are best, or at 0 if none are better than the plain model's;
    and its record. plain: the plain model's replies to the queries of the check."""
    check.ask_model(plain)
    where = layers_of(vector)
    settings = [Setting(where, vector.positions, strength, vector.mode) for strength in STRENGTHS]
    trials = sorted(check.ask(settings), key=_order, reverse=True)
    # without a verifier the loss decides, and the replies only show what is broken
    enough = check.plain.score if instruction.verifier else check.plain.score / 2
    best = trials[0] if trials[0].score > enough else None
    if best is not None:
        check.ask_both(best.setting)
    told_model = Told((), 0, 0, 0, MAX_TOKENS)
    record = Choice(instruction, best, trials, check.plain, check.told, check.both, told_model).record()
    chosen = vector.at(strength=0.0) if best is None else best.setting.of(vector)
    return chosen, record


def _order(trial: Trial) -> tuple[float, float, float]:
    return trial.score, -trial.n_degenerate, -trial.setting.strength
