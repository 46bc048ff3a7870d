"""What steering does, token by token: projections before and after, target, dynamic weight, and the effect.

    trace = localsteer.trace.trace(engine, "Tell me about foxes.", vector)
    trace.lines[0].after          # (n_tokens,): the projection at the vector's layer, steered
    trace.effect                  # (n_tokens,): how far steering moved what the model says there

Pictures of it: terminal.py, plot.py (PNG), html.py. What it means in words: diagnosis.py.

The state before an edit can't be recovered from the state after it. A layer's state at one token depends only
on the layers below, at this token and the earlier ones, never on the edits at the layer itself. Another pass
over the same tokens, without the edits at this layer and above it, therefore gives it exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np

from localsteer.errors import LocalsteerError, PlanError, PromptError
from localsteer.plan import Plan, PositionClass, active, position_classes
from localsteer.runtime.ask import Ask
from localsteer.runtime.forward import passes, wide_size
from localsteer.runtime.generate import chunks_of
from localsteer.runtime.limits import check_layers, check_tokens
from localsteer.runtime.loop import new_request, stops_of
from localsteer.runtime.sampling import GREEDY
from localsteer.steering import dynamic_weights
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.runtime.ask import Prompt
    from localsteer.runtime.sampling import Sampling

Vectors = ControlVector | Sequence[ControlVector]
Layers = Sequence[int] | Literal["all"] | None
DEFAULT_MAX_TOKENS = 64
Numbers = list["float | None"]  # None for what is not a number


class FindingDocument(TypedDict):
    kind: str
    text: str


# plain_id, plain_text, steered_id: of the reply's tokens
TokenDocument = TypedDict(
    "TokenDocument",
    {"id": int, "text": str, "class": str, "plain_id": int, "plain_text": str, "steered_id": int},
    total=False,
)


class LineDocument(TypedDict, total=False):
    """A Line as JSON has it."""

    vector: str
    layer: int
    steered: bool
    mode: str
    positions: str
    strength: float
    mean_with: float | None
    mean_without: float | None
    plain: Numbers
    before: Numbers
    after: Numbers
    target: Numbers
    weight: Numbers
    effect_here: Numbers


class TraceDocument(TypedDict):
    """A Trace as JSON has it."""

    model: str
    reply: str
    finish_reason: str
    n_prompt: int
    diagnosis: list[FindingDocument]
    tokens: list[TokenDocument]
    effect: Numbers
    lines: list[LineDocument]


@dataclass(frozen=True, eq=False)
class Line:
    """One vector at one layer. Arrays: (n_tokens,) float64, in residual-stream units, NaN where there is no
    value.

    plain: the projection in the run without any steering. before: in the steered run, as this layer computed
    it. after: what the next layer reads. target: where the projection should be, including the strength; only
    at steered tokens, and not for `add` and `gate`. weight: how much of the unit direction was added, 0 where
    none was.
    """

    vector: ControlVector
    layer: int
    plain: np.ndarray
    before: np.ndarray
    after: np.ndarray
    target: np.ndarray
    weight: np.ndarray

    @property
    def is_steered(self) -> bool:
        """Whether the vector edits this layer, rather than only being watched there."""
        return self.vector.strength != 0 and self.layer in self.vector.layers

    @property
    def scale(self) -> tuple[float, float]:
        """The projections that count as 0 and 1 of `share`: the means without and with the instruction.

        A vector without means (an import) is scaled by the projections in this trace.
        """
        low, high = self.mean("without"), self.mean("with")
        if low is None or high is None or low == high:
            seen = np.concatenate([self.plain, self.after])
            low, high = float(np.nanmin(seen)), float(np.nanmax(seen))
        return (low, high) if high != low else (low, low + 1.0)

    def mean(self, side: str) -> float | None:
        """The mean projection `with` or `without` the instruction, as measured at extraction."""
        means = getattr(self.vector, f"mean_{side}")
        return None if means is None else float(means[self.layer])

    def share(self, values: np.ndarray) -> np.ndarray:
        """Projections on a scale from 0, as without the instruction, to 1, as with it; they may lie beyond
        both."""
        low, high = self.scale
        return (values - low) / (high - low)

    def to_dict(self) -> LineDocument:
        vector = self.vector
        return {
            "vector": vector.name,
            "layer": self.layer,
            "steered": self.is_steered,
            "mode": vector.mode,
            "positions": vector.positions,
            "strength": vector.strength,
            "mean_with": self.mean("with"),
            "mean_without": self.mean("without"),
            "plain": _numbers(self.plain),
            "before": _numbers(self.before),
            "after": _numbers(self.after),
            "target": _numbers(self.target),
            "weight": _numbers(self.weight),
        }


@dataclass(frozen=True, eq=False)
class Trace:
    """A prompt and its steered reply, and for each token what steering did.

    pieces: the text of each token, special tokens written out. classes: (n_tokens,) int8, PositionClass.
    lines: by vector, then by layer.
    effect: (n_tokens,) float64, nats: the Kullback-Leibler divergence of the steered from the plain
        distribution that this token was drawn from, after the same tokens; NaN for the prompt.
    effect_here: (n_lines, n_tokens), the effect on the same tokens if that line's vector steered at that
        line's layer alone; NaN unless layers were asked for.
    plain_tokens, steered_tokens: the likeliest token of each of the two there, -1 for the prompt.
    plain_pieces: the texts of the former, empty for the prompt.
    finish_reason: `stop` (the last token ends the reply, and was never read by the model; or a stop string of
        the plain `Q: ...` form came, whose tokens are left out), `length`, `given`.
    """

    model: str
    n_prompt: int
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    reply: str
    finish_reason: str
    vectors: tuple[ControlVector, ...]
    lines: tuple[Line, ...]
    effect: np.ndarray
    effect_here: np.ndarray
    plain_tokens: np.ndarray
    steered_tokens: np.ndarray
    plain_pieces: tuple[str, ...]

    @property
    def classes(self) -> np.ndarray:
        return position_classes(np.arange(len(self.tokens)), self.n_prompt)

    @property
    def differs(self) -> np.ndarray:
        """(n_tokens,) bool: where the plain model would say another token than the steered one."""
        return self.plain_tokens != self.steered_tokens

    def covers(self, line: Line) -> np.ndarray:
        """(n_tokens,) bool: the tokens that the line's edit applies to."""
        wanted = [cls for cls in PositionClass if line.is_steered and active(line.vector.positions, cls)]
        return np.isin(self.classes, wanted) & np.isfinite(line.after)

    def of_vector(self, vector: ControlVector) -> list[Line]:
        """The lines of one of `vectors`, by layer."""
        return [line for line in self.lines if line.vector is vector]

    def to_dict(self) -> TraceDocument:
        """The trace as values for JSON; None for what is not a number."""
        from .diagnosis import diagnose

        return {
            "model": self.model,
            "reply": self.reply,
            "finish_reason": self.finish_reason,
            "n_prompt": self.n_prompt,
            "diagnosis": [{"kind": finding.kind, "text": finding.text} for finding in diagnose(self)],
            "tokens": [self._token_dict(i) for i in range(len(self.tokens))],
            "effect": _numbers(self.effect),
            "lines": [
                line.to_dict() | {"effect_here": _numbers(effect)}
                for line, effect in zip(self.lines, self.effect_here, strict=True)
            ],
        }

    def _token_dict(self, i: int) -> TokenDocument:
        cls = PositionClass(self.classes[i])
        entry: TokenDocument = {"id": self.tokens[i], "text": self.pieces[i], "class": cls.name.lower()}
        if i >= self.n_prompt:
            entry["plain_id"], entry["plain_text"] = int(self.plain_tokens[i]), self.plain_pieces[i]
            entry["steered_id"] = int(self.steered_tokens[i])
        return entry


def trace(
    engine: Engine,
    prompt: Prompt,
    steer: Vectors,
    *,
    max_tokens: int | None = DEFAULT_MAX_TOKENS,
    sampling: Sampling = GREEDY,
    reply: str | None = None,
    layers: Layers = None,
    ridge: float = 0.0,
    raw: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_token: Callable[[], None] | None = None,
) -> Trace:
    """Let the steered model answer, and trace every token of prompt and reply.

    reply: a text to trace instead of the model's answer. layers: which to trace; None = where each vector
    steers, `all` = wherever it has a direction; each layer costs one more pass over the tokens. ridge: see
    Plan.from_vectors. on_token: called at each token drawn; an exception from it ends the trace. Raises
    PromptError, MismatchError, PlanError.
    """
    tokens = engine.prompt_tokens(prompt, raw)
    plan = _plan(engine, _listed(steer), ridge)
    if reply is not None:
        answer, reason = reply_tokens(engine, prompt, reply, raw), "given"
    else:
        ask = Ask(prompt, steer=plan, max_tokens=max_tokens, sampling=sampling, raw=raw)
        answer, reason = _draw(engine, ask, on_token)
    return trace_tokens(
        engine,
        [*tokens, *answer],
        len(tokens),
        steer,
        layers=layers,
        ridge=ridge,
        finish_reason=reason,
        on_progress=on_progress,
    )


def trace_tokens(
    engine: Engine,
    tokens: Sequence[int],
    n_prompt: int,
    steer: Vectors,
    *,
    layers: Layers = None,
    ridge: float = 0.0,
    finish_reason: str = "given",
    on_progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """The same for known tokens, the first n_prompt of which are prompt. Generates nothing."""
    vectors = _listed(steer)
    plan = _plan(engine, vectors, ridge)
    if not 1 <= n_prompt <= len(tokens):
        raise PromptError(f"n_prompt must be 1 to the {len(tokens)} tokens given, not {n_prompt}.")
    ended = len(tokens) > n_prompt and engine.ends(tokens[-1])
    read = check_tokens(engine, tokens[:-1] if ended else tokens)
    places = [(vector, layer) for vector in vectors for layer in _watched(engine, vector, layers)]
    run = _Passes(engine, read, n_prompt, plan, places)
    effect, plain_tokens, steered_tokens = run.effect(len(tokens))
    here = np.full((len(places), len(tokens)), np.nan)
    if layers is not None:
        for i in range(len(places)):
            here[i] = run.effect_here(i, vectors, len(tokens))
            if on_progress:
                on_progress(i + 1, len(places))
    pieces = [engine.model.token_to_piece(int(token), special=True) for token in tokens]
    return Trace(
        model=engine.path.name,
        n_prompt=n_prompt,
        tokens=tuple(map(int, tokens)),
        pieces=tuple(_text(piece) for piece in pieces),
        reply=engine.text(list(tokens[n_prompt:])),
        finish_reason=finish_reason,
        vectors=tuple(vectors),
        lines=tuple(run.line(i, len(tokens)) for i in range(len(places))),
        effect=effect,
        effect_here=here,
        plain_tokens=plain_tokens,
        steered_tokens=steered_tokens,
        plain_pieces=tuple(
            _text(engine.model.token_to_piece(int(token), special=True)) if token >= 0 else ""
            for token in plain_tokens
        ),
    )


def reply_tokens(engine: Engine, prompt: Prompt, reply: str, raw: bool = False) -> list[int]:
    """A given reply as the tokens behind the prompt, cut as in one text where the tokenizer allows it."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    rendered = str(prompt) if raw else engine.render(messages)
    ours = engine.prompt_tokens(prompt, raw)
    whole = engine.rendered_tokens(rendered + reply)
    if whole[: len(ours)] == ours:
        return whole[len(ours) :]
    return list(engine.model.tokenize(reply, add_special=False, parse_special=True))


def _listed(steer: Vectors) -> list[ControlVector]:
    """Raises PlanError where there is nothing to look at."""
    vectors = [steer] if isinstance(steer, ControlVector) else list(steer)
    if not vectors or not all(isinstance(vector, ControlVector) for vector in vectors):
        raise PlanError("a trace follows the projections on control vectors: name at least one.")
    return vectors


def _plan(engine: Engine, vectors: Sequence[ControlVector], ridge: float) -> Plan:
    for vector in vectors:
        engine.plan(vector)  # checks that it belongs to this model, which a ready plan no longer tells
    plan = Plan.from_vectors(vectors, ridge=ridge)
    engine.plan(plan)
    return plan


def _watched(engine: Engine, vector: ControlVector, layers: Layers) -> tuple[int, ...]:
    """The requested layers, and those that the vector steers."""
    if layers is None:
        return vector.layers
    if layers == "all":
        return vector.usable_layers
    chosen = check_layers(engine, sorted(set(layers)))
    for layer in chosen:
        vector.unit(layer)  # raises where there is no direction
    return tuple(sorted({*chosen, *vector.layers}))


def _draw(engine: Engine, ask: Ask, on_token: Callable[[], None] | None) -> tuple[list[int], str]:
    """The reply's tokens, a token that ends it included, and why it ended. Tokens of a stop string are left
    out."""
    request = new_request(engine, ask)
    with closing(chunks_of(engine, request)) as chunks:
        for _chunk in chunks:
            if on_token:
                on_token()
    if request.end is not None:
        return [*request.tokens, request.end], "stop"
    if request.text.stopped:
        return _before_stop(engine, request.tokens, stops_of(engine, ask)), "stop"
    return request.tokens, "length"


def _before_stop(engine: Engine, drawn: Sequence[int], stops: Sequence[str]) -> list[int]:
    """The tokens that begin before the first stop string."""
    pieces = [engine.piece(token) for token in drawn]
    hits = [b"".join(pieces).find(stop.encode("utf-8")) for stop in stops]
    cut = min(hit for hit in hits if hit >= 0)
    starts = accumulate(map(len, pieces), initial=0)
    return [token for token, start in zip(drawn, starts, strict=False) if start < cut]


class _Passes:
    """The passes over the tokens: plain, one up to each steered layer but the first, and the steered one.

    All of them decode the same pieces, so whatever no edit reaches is equal to the last bit.
    """

    def __init__(
        self,
        engine: Engine,
        tokens: np.ndarray,
        n_prompt: int,
        plan: Plan,
        places: Sequence[tuple[ControlVector, int]],
    ) -> None:
        self.engine, self.tokens, self.n_prompt, self.plan = engine, tokens, n_prompt, plan
        self.places = places
        self.layers = sorted({layer for _, layer in places})
        self.classes = position_classes(np.arange(len(tokens)), n_prompt)
        self.units = [vector.unit(layer).astype(np.float64) for vector, layer in places]
        shape = (len(places), len(tokens))
        self.plain, self.before, self.after = (np.full(shape, np.nan) for _ in range(3))
        self.target, self.weight = np.full(shape, np.nan), np.zeros(shape)
        self.log_probs: list[np.ndarray] = []
        self.divergence: list[float] = []
        self.plain_best: list[int] = []
        self.steered_best: list[int] = []
        self._run_plain()
        self._run_steered()

    def line(self, i: int, n_tokens: int) -> Line:
        vector, layer = self.places[i]
        arrays = (self.plain, self.before, self.after, self.target, self.weight)
        return Line(vector, layer, *(_padded(array[i], n_tokens) for array in arrays))

    def effect(self, n_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(effect, plain_tokens, steered_tokens): the row at one token is what the next is drawn from."""
        likeliest = [np.full(n_tokens, -1), np.full(n_tokens, -1)]
        for tokens, best in zip(likeliest, (self.plain_best, self.steered_best), strict=True):
            tokens[self.n_prompt :] = best[: n_tokens - self.n_prompt]
        return self._drawn(self.divergence, n_tokens), *likeliest

    def effect_here(self, i: int, vectors: Sequence[ControlVector], n_tokens: int) -> np.ndarray:
        """(n_tokens,): the effect if the vector of line i steered at its layer alone; the others stay."""
        vector, layer = self.places[i]
        moved = [other.at(layer=layer) if other is vector else other for other in vectors]
        try:
            plan = Plan.from_vectors(moved, ridge=self.plan.ridge)
        except PlanError:  # nearly parallel to another vector there
            return np.full(n_tokens, np.nan)
        divergence: list[float] = []
        for _, _, logits in self._pass(plan, []):
            self._diverge(divergence, logits)
        return self._drawn(divergence, n_tokens)

    def _drawn(self, divergence: Sequence[float], n_tokens: int) -> np.ndarray:
        effect = np.full(n_tokens, np.nan)
        effect[self.n_prompt :] = divergence[: n_tokens - self.n_prompt]
        return effect

    def _run_plain(self) -> None:
        lowest = min(self.plan.layers, default=self.engine.model.n_layer)
        for positions, states, logits in self._pass(None, self.layers):
            self._project(self.plain, positions, states)
            self.plain_best += logits.argmax(axis=1).tolist()
            self.log_probs += list(_log_softmax(logits))
            if lowest in states:
                self._meet(positions, {lowest: states[lowest]})

    def _run_steered(self) -> None:
        for layer in self.plan.layers[1:]:
            if layer in self.layers:
                for positions, states, _ in self._pass(self._below(layer), [layer]):
                    self._meet(positions, states)
        for positions, states, logits in self._pass(self.plan, self.layers):
            self.steered_best += logits.argmax(axis=1).tolist()
            self._project(self.after, positions, states)
            self._diverge(self.divergence, logits)
        unedited = [i for i, (_, layer) in enumerate(self.places) if layer not in self.plan.layers]
        self.before[unedited] = self.after[unedited]

    def _below(self, layer: int) -> Plan:
        edits = [edit for edit in self.plan.edits if edit.layer < layer]
        return Plan(edits, ridge=self.plan.ridge, n_embd=self.plan.n_embd)

    def _pass(
        self, plan: Plan | None, layers: Sequence[int]
    ) -> Iterator[tuple[slice, Mapping[int, np.ndarray], np.ndarray]]:
        """Positions of a piece, its states, and the logits of those from the last prompt token on."""
        last = self.n_prompt - 1
        first = 0 if self.engine.model.n_layer - 1 in self.layers else last  # it keeps rows of outputs alone
        for piece, rows, taken, outputs in passes(
            self.engine,
            [self.tokens],
            [first],
            plan=plan if plan is not None and not plan.is_empty else None,
            n_prompt=self.n_prompt,
            capture=layers,
            size=wide_size(self.engine),
        ):
            wanted = max(0, last - max(first, piece.start))
            states = {layer: rows.states[layer][taken] for layer in layers}
            yield slice(piece.start, piece.stop), states, rows.logits[outputs][wanted:]

    def _diverge(self, divergence: list[float], logits: np.ndarray) -> None:
        """Append the divergence of these next rows from the plain run's. Raises LocalsteerError for NaN."""
        if not np.isfinite(logits.max(axis=1)).all():
            raise LocalsteerError("the model gave no finite logits: lower the strength of the steering.")
        for row in _log_softmax(logits):
            plain, row = (x.astype(np.float64) for x in (self.log_probs[len(divergence)], row))
            said = np.exp(row) > 0  # a logit may be minus infinity, in both
            divergence.append(max(0.0, float(np.exp(row[said]) @ (row[said] - plain[said]))))

    def _project(self, into: np.ndarray, positions: slice, states: Mapping[int, np.ndarray]) -> None:
        for i, (_, layer) in enumerate(self.places):
            if layer in states:
                into[i, positions] = states[layer].astype(np.float64) @ self.units[i]

    def _meet(self, positions: slice, states: Mapping[int, np.ndarray]) -> None:
        """What the edits of these layers read, and what they add."""
        self._project(self.before, positions, states)
        for layer, rows in states.items():
            for cls in PositionClass:
                program = self.plan.program(layer, cls)
                here = np.flatnonzero(self.classes[positions] == cls)
                if program is not None and len(here):
                    self._weigh(layer, cls, positions.start + here, dynamic_weights(rows[here], program))

    def _weigh(self, layer: int, cls: PositionClass, at: np.ndarray, weights: np.ndarray) -> None:
        rows = [edit.digest for edit in self.plan.rows(layer, cls)]
        for i, (vector, place) in enumerate(self.places):
            own = Plan.from_vectors([vector.at(layer=layer)]).edits if place == layer else ()
            if not own or layer not in vector.layers or not active(vector.positions, cls):
                continue
            (edit,) = own
            weight = edit.bias if edit.is_constant else weights[:, rows.index(edit.digest)]
            self.weight[i, at] = weight * (edit.writer.astype(np.float64) @ self.units[i])
            if edit.target is not None:
                p = self.before[i, at]
                self.target[i, at] = p + edit.strength * (edit.target - p)


def _padded(values: np.ndarray, n_tokens: int) -> np.ndarray:
    """With NaN for the token that ends the reply: it is drawn, but the model never reads it."""
    return np.concatenate([values, np.full(n_tokens - len(values), np.nan)])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32, computed in float64: a whole reply's rows are kept, and a vocabulary is large."""
    logits = logits.astype(np.float64)
    peak = logits.max(axis=1, keepdims=True)
    return (logits - peak - np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))).astype(np.float32)


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")
