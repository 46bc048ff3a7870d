"""A conversation with one model, with steering for each turn. The terminal is in cli/chat.py.

    with Chat(engine, vectors={"json": json}) as chat:
        chat.steer("json", strength=0.8)
        turn = chat.ask("Tell me about foxes.", on_text=print)

New steering applies to the whole conversation: earlier turns are now prompt, and are read again under the new
plan (kv.py), unless `keep_cache` leaves them as they were computed.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from . import __version__
from .asked import considerate, why_left_out
from .cache import atomic_path
from .errors import LocalsteerError, PlanError, PromptError
from .plan import Plan
from .runtime.ask import MAX_TOKENS, Ask
from .runtime.reply import Reply
from .runtime.sampling import Sampling
from .runtime.scheduler import Scheduler
from .vector import ControlVector, VectorSettings, settings_of

if TYPE_CHECKING:
    from .engine import Engine
    from .runtime.scheduler import Ticket
    from .templates import Message
    from .trace import Trace

FORMAT = 1  # of a saved conversation
MAX_FILE_BYTES = 64 << 20
SAVED_SETTINGS = ("mode", "positions", "strength")
_SEEDS = 2**32 - 1

Say = Callable[[str], None]


class _TurnRecord(TypedDict, total=False):
    left_out: list[str]


class TurnRecord(_TurnRecord):
    question: str
    reply: str
    finish_reason: str
    n_tokens: int
    steering: list[VectorSettings]
    ensure: list[str]


class ChatDocument(TypedDict):
    """A saved conversation. steering, ensure: what steers now."""

    format: int
    localsteer: str
    model: str
    system: str | None
    turns: list[TurnRecord]
    steering: list[VectorSettings]
    ensure: list[str]


@dataclass(frozen=True)
class Turn:
    """A question and its reply. vectors: what the reply was steered by; steering: the same as plain values,
    the only record if a loaded conversation's vectors are missing.

    finish_reason: "stop", "length", or "cancelled", with the reply as far as it had come. left_out: names of
    vectors that would have done harm, because the question asks for the same (asked.py).
    """

    question: str
    reply: str
    finish_reason: str
    steering: tuple[VectorSettings, ...] = ()
    ensured: tuple[str, ...] = ()
    n_tokens: int = 0
    vectors: tuple[ControlVector, ...] = field(default=(), compare=False)
    left_out: tuple[str, ...] = ()

    def record(self) -> TurnRecord:
        record: TurnRecord = {
            "question": self.question,
            "reply": self.reply,
            "finish_reason": self.finish_reason,
            "n_tokens": self.n_tokens,
            "steering": [{**settings} for settings in self.steering],
            "ensure": list(self.ensured),
        }
        if self.left_out:
            record["left_out"] = list(self.left_out)
        return record


class Chat:
    """Not for several threads. engine: an open one, which belongs to the chat while that is open and is not
    closed with it; or, faster, a function that opens one, which is closed with the chat (see Scheduler).

    vectors: what can be steered by, by name. system: a message before all others. sampling: a seed counts up
    from turn to turn. keep_cache: a changed plan leaves what is in the cache as it was computed. tries: of
    `ensure`. always_steer: also by vectors that do harm where the prompt asks for the same already
    (asked.py). plain_forms: as Ask has it. on_note: told what the user should know, one line each.
    """

    def __init__(
        self,
        engine: Engine | Callable[[], Engine],
        *,
        vectors: Mapping[str, ControlVector] | None = None,
        system: str | None = None,
        sampling: Sampling | None = None,
        max_tokens: int | None = MAX_TOKENS,
        stop: Sequence[str] = (),
        ridge: float = 0.0,
        keep_cache: bool = False,
        tries: int = 3,
        always_steer: bool = False,
        plain_forms: bool = False,
        on_note: Say = lambda _text: None,
    ) -> None:
        self.scheduler = Scheduler(engine)
        self.engine = self.scheduler.engine
        self.vectors: dict[str, ControlVector] = {}
        self.active: dict[str, ControlVector] = {}
        self.ensured: dict[str, ControlVector] = {}
        self.turns: list[Turn] = []
        self.system, self.sampling = system, sampling or Sampling()
        self.max_tokens, self.stop, self.ridge = max_tokens, tuple(stop), ridge
        self.keep_cache, self.tries, self.on_note = keep_cache, tries, on_note
        self.always_steer, self.plain_forms = always_steer, plain_forms
        self._insisted: set[str] = set()  # whose strength the user has chosen
        self._told_left_out: set[str] = set()
        self._asked = 0
        self._seen: list[int] = []  # tokens of the last turn, and the plan that they were read under
        self._seen_key = b""
        try:
            for name, vector in (vectors or {}).items():
                self.add(name, vector)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.scheduler.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- steering -----------------------------------------------------------------------------------

    def add(self, name: str, vector: ControlVector) -> None:
        """Make a vector known by this name. Raises MismatchError for one of another model."""
        self.engine.plan(vector)
        self.vectors[name] = replace(vector, name=name)

    def steer(self, name: str, **settings: Any) -> ControlVector:
        """Steer by a known vector from the next reply on; settings: as ControlVector.at has them.

        A name that steers already gets the settings on top. Raises PlanError, and changes nothing then.
        """
        vector = (self.active.get(name) or self._known(name)).at(**settings)
        self._put({**self.active, name: vector})
        self._insist((name,), settings)
        return vector

    def unsteer(self, *names: str) -> tuple[str, ...]:
        """Leave some out, or all. Returns their names. Raises PlanError for one that does not steer."""
        names = names or tuple(self.active)
        for name in names:
            self._steering(name)
        self._put({name: vector for name, vector in self.active.items() if name not in names})
        self._insisted.difference_update(names)
        return names

    def change(self, name: str | None = None, **settings: Any) -> tuple[str, ...]:
        """Settings of one vector that steers, or of all of them. Returns their names. Raises PlanError."""
        names = (name,) if name else tuple(self.active)
        if not names:
            raise PlanError("there is no steering yet: use /steer NAME first.")
        changed = {vector: self._steering(vector).at(**settings) for vector in names}
        self._put({**self.active, **changed})
        self._insist(names, settings)
        return names

    def ensure(self, *names: str) -> None:
        """Steer by these only where a reply fails their verifiers; none switches it off. Raises PlanError."""
        from .ensure import Requirement

        vectors = {name: self._known(name) for name in names}
        for vector in vectors.values():
            Requirement.of(vector, "")
        Plan.from_vectors([*self.active.values(), *vectors.values()], ridge=self.ridge)
        self.ensured = vectors

    def _insist(self, names: Iterable[str], settings: Mapping[str, Any]) -> None:
        """Whether the user chose the strength: such a vector is applied whatever the prompt asks for."""
        if settings.get("strength") is not None:
            self._insisted.update(names)

    def _known(self, name: str) -> ControlVector:
        if name not in self.vectors:
            known = ", ".join(self.vectors) or "none"
            raise PlanError(f"there is no vector {name!r} here: choose one of {known}.")
        return self.vectors[name]

    def _steering(self, name: str) -> ControlVector:
        if name not in self.active:
            raise PlanError(f"{name!r} does not steer: {', '.join(self.active) or 'nothing'} does.")
        return self.active[name]

    def _put(self, active: dict[str, ControlVector]) -> None:
        plan = Plan.from_vectors(list(active.values()), ridge=self.ridge)  # refuses what can't go together
        self.engine.plan(plan)
        self.active = active

    @property
    def plan(self) -> Plan:
        return Plan.from_vectors(list(self.active.values()), ridge=self.ridge)

    # -- talking ------------------------------------------------------------------------------------

    def messages(self, question: str | None = None, *, turns: Iterable[Turn] | None = None) -> list[Message]:
        """The conversation as the chat template takes it, with one question more."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns if turns is None else turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.reply})
        return messages if question is None else [*messages, {"role": "user", "content": question}]

    def ask(self, question: str, *, on_text: Say = lambda _text: None) -> Turn:
        """One turn more. on_text: gets the reply as it comes; with `ensure`, the accepted one at once.

        KeyboardInterrupt ends the reply, not the chat: what has come of it stays; a turn without a word does
        not. Raises PromptError where the conversation fills the context; nothing is ever dropped of it.
        """
        messages = self.messages(question)
        self._check_room(messages)
        ask = self._next_ask(messages)
        steer, left_out = self._considered(messages)
        if self.ensured:
            turn = self._ensured(ask, steer)
            if turn.reply:
                on_text(turn.reply)
        else:
            turn = self._streamed(ask, steer, on_text)
        turn = replace(turn, question=question, left_out=left_out)
        if turn.reply or turn.finish_reason != "cancelled":
            self.turns.append(turn)
        self._say_if_full(messages, turn)
        return turn

    def compare(self) -> tuple[Reply, Reply]:
        """The last question once more: the plain reply, and the one under what steers now. Kept nowhere."""
        if not self.turns:
            raise LocalsteerError("there is no question yet whose replies could be compared: ask one.")
        if not self.active:
            raise LocalsteerError(
                "there is no steering, so there is nothing to compare: use /steer NAME first."
            )
        *before, last = self.turns
        messages = self.messages(last.question, turns=before)
        ask = self._next_ask(messages)
        tickets = [self.scheduler.submit(ask, steer=steer) for steer in ((), self.plan)]
        try:
            plain, steered = (ticket.result() for ticket in tickets)
        finally:
            for ticket in tickets:
                ticket.cancel()
        return plain, steered

    def trace(self, on_progress: Callable[[int, int], None] | None = None) -> Trace:
        """What steering did to the last turn, token by token."""
        from .trace import trace

        if not self.turns:
            raise LocalsteerError("there is no reply to trace yet: ask a question.")
        *before, last = self.turns
        if not last.vectors:
            missing = " by a vector that is here" if last.steering else ""
            raise LocalsteerError(f"the last reply was not steered{missing}: there is nothing to trace.")
        messages = self.messages(last.question, turns=before)
        with self.scheduler.paused() as engine:
            return trace(
                engine, messages, last.vectors, reply=last.reply, ridge=self.ridge, on_progress=on_progress
            )

    def undo(self) -> Turn:
        """Take the last turn back. Raises LocalsteerError when there is none."""
        if not self.turns:
            raise LocalsteerError("there is nothing to undo.")
        return self.turns.pop()

    def clear(self) -> int:
        """Forget all turns; steering stays. Returns how many there were."""
        n = len(self.turns)
        self.turns.clear()
        return n

    def _next_ask(self, messages: Sequence[Message]) -> Ask:
        """Unsteered as yet, and with the seed of the turn."""
        seed = random.randrange(_SEEDS) if self.sampling.seed is None else self.sampling.seed + self._asked
        self._asked += 1
        sampling = replace(self.sampling, seed=seed % _SEEDS)
        limits = {"max_tokens": self.max_tokens, "stop": self.stop}
        return Ask(messages, sampling=sampling, plain_forms=self.plain_forms, **limits)

    def _considered(self, messages: Sequence[Message]) -> tuple[list[ControlVector], tuple[str, ...]]:
        """What steers this turn, and the names of what is left out of it, each told once."""
        always = self.active if self.always_steer else self._insisted
        insisted = [vector for name, vector in self.active.items() if name in always]
        steer, left_out = considerate(self.scheduler, list(self.active.values()), messages, always=insisted)
        for vector in left_out:
            if vector.name not in self._told_left_out:
                self._told_left_out.add(vector.name)
                self.on_note(f"{why_left_out(vector)}; /strength, or --always-steer, applies it anyway.")
        return steer, tuple(vector.name for vector in left_out)

    def _check_room(self, messages: Sequence[Message]) -> None:
        n = len(self.engine.prompt_tokens(messages))
        if n >= self.engine.n_ctx and not self.turns:
            raise PromptError(
                f"the question takes {n} tokens, and the context of {self.engine.n_ctx} must also "
                "hold the reply: "
                "ask a shorter one, or start with a larger context (-c)."
            )
        if n >= self.engine.n_ctx:
            raise PromptError(
                f"the conversation would take {n} tokens, but the context holds {self.engine.n_ctx}: "
                "/undo removes the last turn, /clear forgets all; nothing is dropped automatically."
            )

    def _say_if_full(self, messages: Sequence[Message], turn: Turn) -> None:
        if turn.finish_reason != "length":
            return
        if len(self.engine.prompt_tokens(messages)) + turn.n_tokens >= self.engine.n_ctx:
            self.on_note(
                f"the context of {self.engine.n_ctx} tokens is full, and the reply was cut: "
                "/undo removes the last turn, /clear forgets all."
            )
        else:
            self.on_note(f"the reply was cut after {turn.n_tokens} tokens: raise -n for more.")

    def _streamed(self, ask: Ask, steer: Sequence[ControlVector], on_text: Say) -> Turn:
        plan = Plan.from_vectors(steer, ridge=self.ridge)
        ticket = self.scheduler.submit(ask, steer=plan, keep_cache=self.keep_cache)
        prompt = self.engine.prompt_tokens(ask.prompt)
        texts: list[str] = []
        reason = ""
        try:
            for chunk in ticket:
                if not texts:
                    self._say_what_is_read_again(ticket, prompt, plan)
                texts.append(chunk.text)
                reason = chunk.finish_reason or ""
                if chunk.text:
                    on_text(chunk.text)
        except KeyboardInterrupt:
            reason = "cancelled"
        finally:
            ticket.cancel()
        self._seen, self._seen_key = [*prompt, *ticket.tokens], plan.key
        return self._turn("".join(texts), reason, len(ticket.tokens), tuple(steer))

    def _say_what_is_read_again(self, ticket: Ticket, prompt: Sequence[int], plan: Plan) -> None:
        """Once after a change of steering, before the first word of the reply."""
        if plan.key == self._seen_key or not self.turns:
            return
        pairs = enumerate(zip(prompt, self._seen, strict=False))
        n_known = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(self._seen)))
        n_again = max(0, n_known - ticket.cached_tokens)
        if self.keep_cache:
            self.on_note(
                f"steering changed: {n_known - n_again} of the {n_known} tokens so far stay as they were "
                "computed before (--keep-cache)."
            )
        elif n_again:
            self.on_note(
                f"steering changed: {n_again} of the {n_known} tokens so far are read again under it."
            )

    def _ensured(self, ask: Ask, steer: Sequence[ControlVector]) -> Turn:
        from .ensure import ensure

        vectors = list(self.ensured.values())
        ask = replace(ask, steer=steer)
        try:
            ensured = ensure(self.scheduler, ask, vectors, tries=self.tries, ridge=self.ridge)
        except KeyboardInterrupt:
            return self._turn("", "cancelled", 0, ())
        if ensured.notice:
            self.on_note(ensured.notice)
        elif ensured.steered_strength:
            failed = ", ".join(ensured.tries[0].failed) or "itself"
            self.on_note(
                f"the plain reply fails {failed}: this one is steered at strength "
                f"{ensured.steered_strength:g}."
            )
        chosen = next(attempt for attempt in ensured.tries if attempt.reply is ensured.reply)
        steered = [vector.at(strength=s) for vector, s in zip(vectors, chosen.strengths, strict=False)]
        reply = ensured.reply
        self._seen = []
        return self._turn(reply.text, reply.finish_reason, len(reply.tokens), (*steer, *steered))

    def _turn(self, reply: str, reason: str, n_tokens: int, vectors: tuple[ControlVector, ...]) -> Turn:
        steering = tuple(settings_of(vector) for vector in vectors)
        return Turn("", reply, reason, steering, tuple(self.ensured), n_tokens, vectors)

    # -- files --------------------------------------------------------------------------------------

    def document(self) -> ChatDocument:
        """The whole conversation as JSON-able values: every turn with its steering, and what steers now."""
        return {
            "format": FORMAT,
            "localsteer": __version__,
            "model": self.engine.path.name,
            "system": self.system,
            "turns": [turn.record() for turn in self.turns],
            "steering": [settings_of(vector) for vector in self.active.values()],
            "ensure": list(self.ensured),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation, replacing a saved one in one step. Raises LocalsteerError, also for a file
        that is there and is something else."""
        if os.path.exists(path) and os.path.getsize(path):
            try:
                _read(path)
            except LocalsteerError:
                raise LocalsteerError(
                    f"{path} already exists and is not a saved conversation: choose another name."
                ) from None
        with atomic_path(path) as temporary:
            text = json.dumps(self.document(), indent=2, ensure_ascii=False)
            temporary.write_text(text + "\n", "utf-8", errors="surrogatepass")

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take up a saved conversation in the place of this one. Raises LocalsteerError, and changes nothing
        then; a vector that is not here is left out, with a note."""
        document = _read(path)
        turns = [self._read_turn(row, path) for row in document["turns"]]
        wanted = _settings_list(document.get("steering", []), path)
        active = {
            settings["name"]: self._vector_at(settings)
            for settings in wanted
            if settings["name"] in self.vectors
        }
        names = _names(document.get("ensure"))
        system = document.get("system")
        if not (system is None or isinstance(system, str)):
            raise LocalsteerError(f"{path} is not a saved conversation: its system message is not text.")
        self._put(active)
        self.ensured = {name: self.vectors[name] for name in names if name in self.vectors}
        self.turns, self.system, self._seen = turns, system, []
        missing = {settings["name"] for settings in wanted} | set(names)
        for name in sorted(missing - set(self.vectors)):
            self.on_note(f"there is no vector {name!r} here: the conversation continues without it.")
        if document.get("model") != self.engine.path.name:
            self.on_note(f"this conversation was held with {document.get('model')}.")

    def _read_turn(self, row: Any, path: str | os.PathLike[str]) -> Turn:
        texts = [row.get(key) if isinstance(row, dict) else None for key in ("question", "reply")]
        if not all(isinstance(text, str) for text in texts) or not texts[0]:
            raise LocalsteerError(
                f"{path} is not a saved conversation: a turn lacks its question or its reply."
            )
        steering = _settings_list(row.get("steering", []), path)
        here = all(settings["name"] in self.vectors for settings in steering)
        vectors = tuple(self._vector_at(settings) for settings in steering) if here else ()
        n_tokens = row.get("n_tokens")
        return Turn(
            question=texts[0],
            reply=texts[1],
            finish_reason=str(row.get("finish_reason") or "stop"),
            steering=tuple(steering),
            ensured=tuple(_names(row.get("ensure"))),
            n_tokens=n_tokens if isinstance(n_tokens, int) else 0,
            vectors=vectors,
        )

    def _vector_at(self, settings: VectorSettings) -> ControlVector:
        values = {key: settings[key] for key in SAVED_SETTINGS if key in settings}
        return self.vectors[settings["name"]].at(layer=settings.get("layers"), **values)


def _names(value: Any) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _settings_list(rows: Any, path: str | os.PathLike[str]) -> list[VectorSettings]:
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("name"), str) for row in rows
    ):
        raise LocalsteerError(f"{path} is not a saved conversation: its steering is not a list of vectors.")
    return rows


def _read(path: str | os.PathLike[str]) -> ChatDocument:
    """The document of a file. Raises LocalsteerError."""
    try:
        if Path(path).stat().st_size > MAX_FILE_BYTES:
            raise LocalsteerError(
                f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB: no saved conversation is."
            )
        document = json.loads(Path(path).read_text("utf-8", errors="surrogatepass"))
    except OSError as error:
        raise LocalsteerError(f"can't read {path} ({error.strerror or error}).") from None
    except (ValueError, RecursionError):
        raise LocalsteerError(f"{path} is not a saved conversation: it is not JSON.") from None
    if not isinstance(document, dict) or not isinstance(document.get("turns"), list):
        raise LocalsteerError(f"{path} is not a saved conversation: it has no turns.")
    if document.get("format") != FORMAT:
        raise LocalsteerError(
            f"{path} has format {document.get('format')!r}, and this version reads {FORMAT}: "
            "update localsteer."
        )
    return document
