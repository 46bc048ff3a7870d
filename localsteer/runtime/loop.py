"""The one generation loop: one decode per step for all replies, each with its own plan, sampler and stop
strings.

Sequences join and leave between steps. A prompt takes its beginning from the cache if tokens and edits there
are the same (kv.py). A single sequence is a loop with one request. generate.py runs a loop to its end,
scheduler.py keeps one running.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..constrain import Constraint, Matcher
from ..errors import HostError, LocalsteerError
from ..plan import Plan, PositionClass, position_classes
from .ask import Ask
from .bridge import Sampler
from .forms import FormWatch
from .kv import CachedSequences, class_keys
from .limits import check_layers, check_room, check_tokens
from .reply import Chunk, Clock, TextStream, TokenScores
from .sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from ..engine import Engine
    from .bridge import Rows

_GENERATION = int(PositionClass.GENERATION)  # plain numbers, since an enum costs time at every token
_FORM = int(PositionClass.FORM)
# With separate caches: two more rows cost less than a second decode, so up to this many sequences in between
# are decoded for nothing, to join the replies on both sides of them. Copying a cache copies all its cells: a
# prefix below this share of them is read again instead.
MAX_GAP = 2
MIN_COPIED = 1 / 64

Event = tuple["Request", Chunk | LocalsteerError]


@dataclass(eq=False)
class Request:
    """One prompt on its way to a reply. pending: tokens not decoded yet, of the prompt or the last one drawn.

    n_cached: tokens of the prompt that came from the cache. n_top, keep_cache: see Ask. end: the
    end-of-generation token that was drawn. capture: layers whose `states` at the last prompt token,
    (len(capture), n_embd), are wanted instead of a reply. form: watches for forms that stay plain; in_form:
    positions of the tokens inside them.
    """

    prompt: list[int]
    budget: int
    plan: Plan | None
    sampling: Sampling
    text: TextStream
    clock: Clock
    slot: int = -1  # llama.cpp's request id while it is live
    n_past: int = 0
    n_cached: int = 0
    pending: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    sampler: Sampler | None = None
    matcher: Matcher | None = None
    n_top: int | None = None
    keep_cache: bool = False
    capture: tuple[int, ...] = ()
    states: np.ndarray | None = None
    end: int | None = None
    form: FormWatch | None = None
    in_form: set[int] = field(default_factory=set)

    @property
    def n_prompt(self) -> int:
        return len(self.prompt)

    @property
    def known(self) -> list[int]:
        """All tokens so far; the model has yet to read the last one."""
        return self.prompt + self.tokens

    @property
    def n_ahead(self) -> int:
        """Cells that this request may still take."""
        return self.n_prompt + self.budget - self.n_past

    def classes(self, start: int, n: int) -> list[int]:
        """The PositionClass of n positions."""
        if start < self.n_prompt:
            classes = position_classes(np.arange(start, start + n), self.n_prompt).tolist()
        else:
            classes = [_GENERATION] * n
        if self.in_form:
            classes = [_FORM if start + i in self.in_form else cls for i, cls in enumerate(classes)]
        return classes


def new_request(engine: Engine, ask: Ask) -> Request:
    """A checked request. A grammar is compiled here, in the caller's thread, which may take a while.

    Raises PromptError, MismatchError, PlanError, ConstraintError.
    """
    plan = engine.plan(ask.steer)
    tokens = (
        engine.prompt_tokens(ask.prompt, ask.raw)
        if ask.tokens is None
        else check_tokens(engine, ask.tokens).tolist()
    )
    check_room(engine, len(tokens))
    room = engine.n_ctx - len(tokens)
    return Request(
        prompt=tokens,
        budget=room if ask.max_tokens is None else min(room, ask.max_tokens),
        plan=plan,
        sampling=ask.sampling,
        text=TextStream(stops_of(engine, ask)),
        clock=Clock(time.perf_counter(), len(tokens)),
        matcher=_new_matcher(engine, ask.sampling),
        n_top=ask.n_top,
        keep_cache=ask.keep_cache,
        form=_new_form_watch(ask, plan),
    )


def stops_of(engine: Engine, ask: Ask) -> list[str]:
    """The caller's stop strings, and those that the prompt's form needs (ChatTemplate.stop); a raw prompt
    needs none."""
    has_form = ask.tokens is None and not ask.raw
    return list(dict.fromkeys([*ask.stop, *(engine.template.stop if has_form else ())]))


def new_look(engine: Engine, tokens: Sequence[int], layers: Sequence[int]) -> Request:
    """A request for states instead of a reply (Request.capture)."""
    request = new_request(engine, Ask(tokens=tokens, max_tokens=1, sampling=GREEDY))
    request.capture = tuple(check_layers(engine, layers))
    return request


def _new_matcher(engine: Engine, sampling: Sampling) -> Matcher | None:
    return None if sampling.grammar is None else engine.token_bytes.matcher(Constraint.of(sampling.grammar))


def _new_form_watch(ask: Ask, plan: Plan | None) -> FormWatch | None:
    """The watch for forms, or None if it is not needed: no generated token is steered anyway."""
    if not ask.plain_forms or plan is None or not plan.class_key(PositionClass.GENERATION):
        return None
    return FormWatch(forced=ask.sampling.grammar is not None)


def new_sampler(engine: Engine, request: Request) -> Sampler | None:
    """A sampler for one reply, or None if the largest logit decides."""
    sampling = request.sampling
    if sampling.is_argmax:
        return None
    settings = {
        field.name: getattr(sampling, field.name) for field in fields(sampling) if field.name != "grammar"
    }
    if sampling.repeat_last_n < 0:
        settings["repeat_last_n"] = engine.n_ctx  # llama.cpp's sampler itself takes -1 for off
    return Sampler(engine.model, **settings, matcher=request.matcher)


class Loop:
    """prefill_chunk: prompt tokens per step while others are replying, so that those don't stall; None: as
    many as fit. reuse: take the beginning of a prompt from the cache; a reply then depends slightly on what
    was asked before. Other calls on the engine end the loop: its next step raises LocalsteerError."""

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request] = (),
        *,
        prefill_chunk: int | None = None,
        reuse: bool = True,
    ) -> None:
        self.engine = engine
        self.reuse = reuse
        self.prefill_chunk = prefill_chunk or engine.context.n_batch
        self.waiting: deque[Request] = deque(requests)
        self.live: list[Request] = []
        self.cache = CachedSequences(engine.context)
        self._idle = deque(range(engine.n_seq_max))  # free slots, the one unused for longest first
        self._run = engine.begin()

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.live)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def step(self) -> Iterator[Event]:
        """Run one decode (or several with separate caches). Returns a chunk for each request that drew a
        token, or its error.

        A request leaves with its last chunk or its error. An error of the decode itself concerns all
        requests.
        """
        self.engine.check_run(self._run)
        if self.waiting and not self.live:  # no other request needs what the cache holds
            try:
                self._attend()
            except HostError as error:
                yield from self._refuse(error)
                return
        yield from self._admit()
        if not self.live:
            return
        events: list[Event] = []
        for parts in self._decodes():
            try:
                drawing, logits = self._decode(parts)
            except LocalsteerError as error:
                events += self._fail(error)
                break
            if drawing:
                events += self._draw(drawing, logits)
        # only now: the receivers may take the context
        yield from events

    def run(self) -> Iterator[tuple[Request, Chunk]]:
        """Yields chunks until all requests have ended. Raises the first error of any; closing it ends them
        all."""
        try:
            while self.busy:
                for request, event in self.step():
                    if isinstance(event, LocalsteerError):
                        raise event
                    yield request, event
        finally:
            self.close()

    def drop(self, request: Request) -> None:
        """End a request early; what it has decoded stays in the cache for others."""
        if request in self.live:
            self._leave(request)
        elif request in self.waiting:
            self.waiting.remove(request)
            _end(request)

    def begin_again(self) -> None:
        """Continue after other calls on the engine: live requests read their tokens again."""
        self._run = self.engine.take()
        self.cache.clear()
        for request in reversed(self.live):
            self._idle.append(request.slot)
            request.slot, request.n_past = -1, 0
            self.waiting.appendleft(request)
        self.live.clear()

    def close(self) -> None:
        for request in [*self.live, *self.waiting]:
            self.drop(request)

    # -- joining and leaving ------------------------------------------------------------------------

    def _admit(self) -> Iterator[Event]:
        """Admit what fits. Cells are reserved for whole replies, so a live request never runs out of them."""
        while self.waiting and self._idle:
            request = self.waiting[0]
            if request.budget == 0:
                self.waiting.popleft()
                yield request, Chunk("", None, "length", request.clock.timings(0))
                continue
            if not self._place(request):
                return
            self.waiting.popleft()
            request.sampler = request.sampler or new_sampler(self.engine, request)
            self.live.append(request)

    def _place(self, request: Request) -> bool:
        """Give a request a slot, with as much of its prompt as the cache holds; False if there is no room
        yet."""
        if not (self.reuse or self.live):
            self.cache.clear()
        known = request.known
        keys = None if request.keep_cache else _keys(request.plan, request.classes(0, len(known)))
        slots = range(self.engine.n_seq_max)
        common = {slot: self.cache.common(slot, known, keys) for slot in slots}
        source = max(slots, key=lambda slot: (common[slot], slot in self._idle))
        # the last token is decoded in any case, since its logits are needed
        n_common = min(common[source], len(known) - 1)
        slot = self._slot_for(source, n_common)
        if slot != source and not self._is_worth_sharing(n_common):
            n_common = 0
        wanted = request.n_prompt + request.budget - n_common
        if not self._make_room(wanted, source, slot, n_common):
            slot = source
            if slot not in self._idle or not self._make_room(wanted, source, slot, n_common):
                return False
        if slot != source:
            self.cache.share(source, slot, n_common)
        n_common = self.cache.cut(slot, n_common)
        self._idle.remove(slot)
        request.slot, request.n_past, request.n_cached = slot, n_common, n_common
        request.pending = known[n_common:]
        if not request.tokens:
            request.clock.started = time.perf_counter()
        return True

    def _slot_for(self, source: int, n_common: int) -> int:
        """The source slot, if that loses less than half of what it holds; otherwise an idle slot that is
        empty or unused for longest, which keeps the source for others."""
        if source in self._idle and 2 * n_common >= self.cache.length(source):
            return source
        others = [slot for slot in self._idle if slot != source] or [source]
        return min(others, key=lambda slot: self.cache.length(slot) > 0)  # the first among equals

    def _is_worth_sharing(self, n_common: int) -> bool:
        context = self.engine.context
        return context.kv_unified or n_common >= MIN_COPIED * context.n_ctx_seq

    def _make_room(self, wanted: int, source: int, slot: int, n_common: int) -> bool:
        """Forget idle sequences, those unused for longest first, until `wanted` cells are certain to be
        free."""
        if not self.engine.context.kv_unified:
            return True  # a sequence's own cache is as long as a request may be
        promised = sum(request.n_ahead for request in self.live)

        def fits() -> bool:
            given_up = self.cache.own_cells(slot, n_common if slot == source else 0)
            return self.cache.n_used - given_up + promised + wanted <= self.engine.n_cells

        for other in list(self._idle):
            if fits():
                break
            if other not in (source, slot):
                self.cache.cut(other, 0)
        return fits()

    def _leave(self, request: Request) -> None:
        self.live.remove(request)
        self._idle.append(request.slot)
        _end(request)

    def _fail(self, error: LocalsteerError) -> list[Event]:
        """Drop everything after a failed decode, whose rows can't be trusted."""
        self.cache.clear()
        failed = list(self.live)
        for request in failed:
            self._leave(request)
        return [(request, error) for request in failed]

    # -- one step -----------------------------------------------------------------------------------

    def _attend(self) -> None:
        """Load a model again if it lost a host; its cache is then empty. Raises HostError."""
        hosts = self.engine.model.hosts
        if hosts and hosts.lost:
            self.engine.attend()
            self.cache.clear()

    def _refuse(self, error: LocalsteerError) -> list[Event]:
        """Fail the waiting requests, since none can be admitted."""
        refused = list(self.waiting)
        for request in refused:
            self.drop(request)
        return [(request, error) for request in refused]

    def _parts(self) -> list[tuple[Request, int]]:
        """Which requests are decoded in this step, with how many tokens: the last token of every reply, and
        as much of prompts as there is room for."""
        # replies first, so that a long prompt can't starve them; llama.cpp needs a request's tokens together
        self.live.sort(key=lambda request: not request.tokens)
        room = self.engine.context.n_batch
        chunk = self.prefill_chunk if self.live[0].tokens else room
        parts = []
        for request in self.live:
            n = min(len(request.pending), room, room if request.tokens else chunk)
            if n == 0:
                break
            room -= n
            chunk -= 0 if request.tokens else n
            parts.append((request, n))
        return parts

    def _decodes(self) -> list[list[tuple[Request, int]]]:
        """The parts of this step that are decoded together. With separate caches (bridge/context.py) these
        are single tokens of requests in slots near each other, or several tokens of one request."""
        parts = self._parts()
        if self.engine.context.kv_unified:
            return [parts]
        runs: list[list[tuple[Request, int]]] = []
        singles = (part for part in parts if part[1] == 1)
        for request, n in sorted(singles, key=lambda part: part[0].slot):
            if runs and request.slot - runs[-1][-1][0].slot <= 1 + MAX_GAP:
                runs[-1].append((request, n))
            else:
                runs.append([(request, n)])
        return [*runs, *([part] for part in parts if part[1] > 1)]

    def _decode(self, parts: Sequence[tuple[Request, int]]) -> tuple[list[Request], np.ndarray]:
        """Which requests draw their next token now, and the logits for it, (requests, n_vocab)."""
        tokens, positions, slots, outputs, classes = [], [], [], [], []
        plans: list[Plan | None] = []
        drawing, filled = [], []
        for request, n in parts:
            if slots and not self.engine.context.kv_unified:
                for slot in range(slots[-1] + 1, request.slot):
                    # any token, after what the slot holds; there is room, since the last token drawn is never
                    # decoded
                    filled.append((slot, self.cache.length(slot)))
                    tokens.append(0)
                    positions.append(self.cache.length(slot))
                    slots.append(slot)
                    outputs.append(False)
                    plans.append(None)
                    classes.append(_GENERATION)
            start, request.n_past = request.n_past, request.n_past + n
            taken, request.pending = request.pending[:n], request.pending[n:]
            found = request.classes(start, n)
            self.cache.append(request.slot, taken, _keys(request.plan, found))
            tokens += taken
            positions += range(start, start + n)
            slots += [request.slot] * n
            outputs += [False] * (n - 1) + [not request.pending]
            plans += [request.plan] * n
            classes += found
            if not request.pending:
                drawing.append(request)
        rows = self._rows(drawing, tokens, positions, slots, outputs, plans=plans, classes=classes)
        for slot, position in filled:
            self.engine.context.seq_rm(slot, position)
        return drawing, rows.logits if drawing else np.empty(0)

    def _rows(self, drawing: Sequence[Request], *batch: Sequence[int], **steering: Any) -> Rows:
        """Decode, and keep the states that some of `drawing` ask for; their tokens are the outputs."""
        asking = [i for i, request in enumerate(drawing) if request.capture]
        if not asking:
            return self.engine.context.decode(*batch, **steering)
        layers = {layer for i in asking for layer in drawing[i].capture}
        mask = np.isin(np.arange(len(batch[-1])), np.flatnonzero(batch[-1])[asking])
        rows = self.engine.context.decode(*batch, **steering, capture=layers, capture_tokens=mask)
        for row, i in enumerate(asking):
            drawing[i].states = np.stack([rows.states[layer][row] for layer in drawing[i].capture])
        return rows

    def _draw(self, drawing: Sequence[Request], logits: np.ndarray) -> list[Event]:
        """Draw the next tokens: row i of `logits` is for drawing[i]."""
        likeliest = logits.argmax(axis=1).tolist()
        finite = np.isfinite(logits[np.arange(len(likeliest)), likeliest]).tolist()
        events: list[Event] = []
        for i, request in enumerate(drawing):
            if request.capture:
                self._leave(request)
                events.append((request, self._last(request, "", None, "stop")))
                continue
            try:
                if not finite[i]:
                    raise LocalsteerError(
                        "the model gave no finite logits: lower the strength of the steering."
                    )
                token = likeliest[i]
                if request.sampler:
                    token = request.sampler.sample(self.engine.context, i)
                chunk = self._accept(request, token)
                if request.n_top is not None and chunk.token is not None:
                    chunk = replace(chunk, scores=TokenScores.of(logits[i], token, request.n_top))
            except LocalsteerError as error:
                self._leave(request)
                events.append((request, error))
                continue
            if chunk.finish_reason:
                self._leave(request)
            events.append((request, chunk))
        return events

    def _accept(self, request: Request, token: int) -> Chunk:
        """Take in a token and return its chunk, which has a finish reason if it is the last."""
        request.clock.tick()
        if self.engine.ends(token):
            request.end = token
            return self._last(request, request.text.finish(), None, "stop")
        request.tokens.append(token)
        piece = self.engine.piece(token)
        if request.form and request.form.push(piece):
            request.in_form.add(request.n_prompt + len(request.tokens) - 1)
        text = request.text.push(piece)
        if request.text.stopped:
            return replace(self._last(request, text, token, "stop"), stopped_by=request.text.stopped_by)
        if len(request.tokens) == request.budget:
            return self._last(request, text + request.text.finish(), token, "length")
        request.pending = [token]
        return Chunk(text, token)

    @staticmethod
    def _last(request: Request, text: str, token: int | None, reason: str) -> Chunk:
        return Chunk(text, token, reason, request.clock.timings(len(request.tokens)))


def _end(request: Request) -> None:
    if request.sampler:
        request.sampler.close()
        request.sampler = None


def _keys(plan: Plan | None, classes: Sequence[int]) -> list[bytes]:
    keys = class_keys(plan)
    return [keys[cls] for cls in classes]
