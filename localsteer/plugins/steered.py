"""A model that is opened at its first question, and steering as text: `json`, `rhyme.gguf:0.8@12`, or own
words.

    with SteeredModel("smol") as model:
        answer = model.ask(messages, SteeringWords(steer=("json",)), Wanted(max_tokens=64))
        for text in answer: ...
        answer.record()

Vectors come from the same places as for `localsteer run -i` and `-s`: a file, a pack, the cache, or made now.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import click

from localsteer.cli.interrupt import handled
from localsteer.cli.options import parse_layers
from localsteer.cli.vector_spec import VectorSpec
from localsteer.errors import LocalsteerError, PlanError
from localsteer.jsonable import JsonObject
from localsteer.tool_calls import Call, CallHold, calls_in

if TYPE_CHECKING:
    from localsteer.constrain import Constraint
    from localsteer.engine import Engine
    from localsteer.ensure import Ensured, EnsuredRecord
    from localsteer.runtime.ask import Ask
    from localsteer.runtime.reply import Timings
    from localsteer.runtime.sampling import Sampling
    from localsteer.runtime.scheduler import Scheduler, Ticket
    from localsteer.templates import Message
    from localsteer.vector import ControlVector, VectorSettings

JOIN = "+"  # between names, as in a model's name of the server
SETTINGS = ("layer", "mode", "positions", "strength")
TRIES = 3  # of `ensure`
N_SEQ_MAX = 2  # a second question need not wait for the first, and two prefixes stay in the cache
_SEEDS = 2**32 - 1


def listed_names(text: str | Sequence[str] | None, what: str = "steer") -> tuple[str, ...]:
    """The names, files and instructions in `json+lowercase`, a JSON list of texts, or a list.

    A text with a blank in it is an instruction in words, or a file, and is not split. Raises PlanError for an
    empty name, and for a list that holds anything but texts.
    """
    if text is not None and not isinstance(text, (str, Sequence)):
        raise PlanError(f"{what} must be a text or a list of texts, not {text!r:.80}.")
    names = [] if text is None else _listed(text, what) if isinstance(text, str) else list(text)
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise PlanError(f"{what}: {text!r:.80} has a name that is empty or not a text: write json+lowercase.")
    return tuple(name.strip() for name in names)


def _listed(text: str, what: str) -> list[Any]:
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise PlanError(
                f'{what}: {text!r:.80} is not a JSON list: write ["json", "Use rhyme."], or json+lowercase.'
            ) from None
    return [text] if os.path.isfile(text) or is_own_words(text) else text.split(JOIN)


def is_own_words(text: str) -> bool:
    """Whether a text is an instruction and no name: names have no blank, and files end in .gguf."""
    return any(map(str.isspace, text.strip())) and ".gguf" not in text.lower()


@dataclass(frozen=True)
class SteeringWords:
    """What to steer by. steer, ensure: names, files or own words (`listed_names`). The settings override the
    vectors', and are overridden by those after a name (`json:0.8@12`). layer: as a text, `12`, `3,4` or
    `3-5`."""

    steer: tuple[str, ...] = ()
    ensure: tuple[str, ...] = ()
    tries: int = TRIES
    always: bool = False
    layer: int | str | None = None
    mode: str | None = None
    positions: str | None = None
    strength: float | None = None

    def settings(self) -> JsonObject:
        """The settings, as arguments of ControlVector.at. Raises PlanError for settings without a vector, and
        for an invalid layer."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        idle = [name for name, value in settings.items() if value is not None]
        if idle and not (self.steer or self.ensure):
            raise PlanError(f"{idle[0]} needs something to steer by: name an instruction or a vector file.")
        if self.layer is not None:
            try:
                settings["layer"] = parse_layers(str(self.layer))
            except ValueError as error:
                raise PlanError(f"layer: {error}") from None
        return settings


class AnswerRecord(TypedDict, total=False):
    """What was done. plain_tokens: how many were left plain, in a forced form. left_out: names of vectors
    that would have done harm. ensure: what was tried."""

    steering: list[VectorSettings]
    seed: int
    finish_reason: str
    plain_tokens: int
    left_out: list[str]
    ensure: EnsuredRecord


@dataclass(frozen=True)
class Wanted:
    """What reply is wanted. max_tokens: None = until the context is full. sampling: fields of Sampling.

    tools: functions that the reply may call, as chat templates take them ({"type": "function", ...}).
    tool_choice: None = as the model likes; `required`, or the name of the tool that must be called.
    steer_forms: also steer inside calls and under a grammar (docs/clients.md)."""

    max_tokens: int | None = 512
    stop: tuple[str, ...] = ()
    sampling: JsonObject = field(default_factory=dict)
    tools: tuple[JsonObject, ...] = ()
    tool_choice: str | None = None
    steer_forms: bool = False

    def drawn(self, own: Mapping[str, Any] | None = None) -> Sampling:
        """With a seed, so that the record can name it. own: what the model has where nothing is wanted."""
        from localsteer.runtime.sampling import Sampling

        seed = self.sampling.get("seed")
        chosen = random.randrange(_SEEDS) if seed in (None, -1) else seed
        if not 0 <= chosen <= _SEEDS:
            raise LocalsteerError(f"seed must be 0 to {_SEEDS}, or -1 for a new one each time, not {seed}.")
        settings = {**(own or {}), **self.sampling, "seed": chosen}
        call = self.forced_call()
        return Sampling(**(settings if call is None else {**settings, "grammar": call}))

    @property
    def is_form(self) -> bool:
        """Whether a program may read of the reply: all of it, or a call in it."""
        return bool(self.tools or self.sampling.get("grammar") or self.tool_choice)

    def forced_call(self) -> Constraint | None:
        """A constraint to one call, if it is forced. Raises LocalsteerError for a choice that does not match
        the tools."""
        from localsteer.constrain import Constraint

        functions = [tool["function"] for tool in self.tools]
        if self.tools and self.sampling.get("grammar"):
            raise LocalsteerError("a schema excludes tools: use only one of them.")
        if self.tool_choice in (None, "auto"):
            return None
        if not functions:
            raise LocalsteerError("tool_choice needs tools: offer some, or leave it out.")
        if self.tool_choice != "required":
            names = [function["name"] for function in functions]
            functions = [function for function in functions if function["name"] == self.tool_choice]
            if not functions:
                raise LocalsteerError(
                    f"tool_choice: there is no tool {self.tool_choice!r:.80}: choose required, auto or "
                    f"{', '.join(names)}."
                )
        return Constraint.tool_call([(function["name"], function["parameters"]) for function in functions])


class SteeredModel:
    """One model by name or path. It is opened at the first question and kept open, so that a conversation's
    turns find their prefix in the cache. Any thread may ask.

    loading: ctx_size, threads, gpu_layers; None = the default. Raises LocalsteerError for any error that a
    user can cause, including click's.
    """

    def __init__(self, model: str, **loading: int | None) -> None:
        self.model = model
        self.loading = {"ctx_size": 0, "threads": None, "gpu_layers": 0} | {
            name: value for name, value in loading.items() if value is not None
        }
        self._scheduler: Scheduler | None = None
        self._opening = threading.Lock()
        self._vectors: dict[tuple[str, Any], ControlVector] = {}

    @property
    def scheduler(self) -> Scheduler:
        with self._opening:
            if self._scheduler is None:
                from localsteer.cli.models import load_engine
                from localsteer.runtime.scheduler import Scheduler

                with one_kind_of_error():
                    # opened in the thread that decodes (see Scheduler)
                    own = {"as_asked": True, "n_seq_max": N_SEQ_MAX}
                    opener = partial(load_engine, self.model, **self.loading, **own)
                    self._scheduler = Scheduler(opener)
            return self._scheduler

    @property
    def is_open(self) -> bool:
        return self._scheduler is not None

    @property
    def engine(self) -> Engine:
        return self.scheduler.engine

    def close(self) -> None:
        if self._scheduler is not None:
            self._scheduler.close()
            self._scheduler = None

    def __enter__(self) -> SteeredModel:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def vectors(self, words: SteeringWords) -> tuple[list[ControlVector], list[ControlVector]]:
        """The vectors to steer by, and those to ensure; a vector for a new instruction is made now."""
        from localsteer.cli.run import vector_to_ensure

        settings = words.settings()
        with one_kind_of_error(), handled():  # so that Ctrl-C gets through a load, and ends a search early
            always = [self._known(text, settings, self._vector) for text in words.steer]
            checked = [self._known(text, settings, vector_to_ensure, "ensure") for text in words.ensure]
        return always, checked

    def _known(
        self, text: str, settings: JsonObject, make: Callable[..., ControlVector], kind: str = "steer"
    ) -> ControlVector:
        key = (kind, text, _stamp(text), *settings.values())
        if key not in self._vectors:
            data = {"catalog": None, "slots": (), "queries": None, "pairs": None}
            self._vectors[key] = make(self.model, text, {**settings, **data}, self.loading)
        return self._vectors[key]

    def _vector(self, model: str, text: str, params: JsonObject, loading: JsonObject) -> ControlVector:
        from localsteer.cli.run import vector_of

        if is_own_words(text):
            return vector_of(model, text, params, loading)
        spec = VectorSpec.parse(text)
        if os.path.exists(spec.path) or Path(spec.path).suffix == ".gguf":
            return spec.load(**{name: params[name] for name in SETTINGS})
        if spec.layers is not None:  # as `layer`: no layer is looked for
            params = {**params, "layer": spec.layers}
        return vector_of(model, spec.path, params, loading).at(strength=spec.strength)

    def ask(
        self, messages: Sequence[Message], words: SteeringWords, wanted: Wanted, *, n_top: int | None = None
    ) -> SteeredAnswer:
        """Check everything, and return an answer, whose reply is generated as it is read."""
        from localsteer.asked import considerate
        from localsteer.model_names import asked_of
        from localsteer.runtime.ask import Ask

        if wanted.tools and words.ensure:
            raise LocalsteerError(
                "ensure returns one checked text, which excludes tools: leave one of them out."
            )
        sampling = wanted.drawn(asked_of(self.model).sampling)
        always, checked = self.vectors(words)
        with one_kind_of_error():
            for vector in (*always, *checked):
                self.engine.plan(vector)
            literal = words.always or words.strength is not None
            insisted = always if literal else _with_own_strength(words.steer, always)
            applied, left_out = considerate(self.scheduler, always, messages, always=insisted)
            ask = Ask(
                messages,
                steer=applied,
                max_tokens=wanted.max_tokens,
                sampling=sampling,
                stop=wanted.stop,
                n_top=n_top,
                plain_forms=wanted.is_form and not wanted.steer_forms,
            )
            if wanted.tools:
                ask = self._with_tools(ask, wanted.tools)
            names = {tool["function"]["name"] for tool in wanted.tools}
            return SteeredAnswer(self, ask, Steering(applied, left_out, checked, words.tries), names)

    def _with_tools(self, ask: Ask, tools: Sequence[dict[str, Any]]) -> Ask:
        """The same with the prompt rendered, since only the template shows tools to a model."""
        template = self.engine.template
        if not template.takes_tools:
            raise LocalsteerError(
                f"the chat template of {self.model} has no tools: leave them out, or ask another model."
            )
        prompt = self.engine.render(ask.prompt, tools=list(tools))
        return replace(ask, prompt=prompt, raw=True, stop=(*ask.stop, *template.stop))


def _with_own_strength(texts: Sequence[str], vectors: Sequence[ControlVector]) -> list[ControlVector]:
    pairs = zip(texts, vectors, strict=True)
    return [
        vector
        for text, vector in pairs
        if not is_own_words(text) and VectorSpec.parse(text).strength is not None
    ]


def _stamp(text: str) -> int | None:
    """When a vector file was changed: a new one of the same name is another vector."""
    try:
        return None if is_own_words(text) else os.stat(VectorSpec.parse(text).path).st_mtime_ns
    except (OSError, ValueError, LocalsteerError):  # ValueError: what can't be the name of a file
        return None


@dataclass(frozen=True)
class Steering:
    """What one reply is steered by. left_out: vectors that would do harm (asked.py); checked: what it must
    follow, within the given number of tries."""

    applied: Sequence[ControlVector] = ()
    left_out: Sequence[ControlVector] = ()
    checked: Sequence[ControlVector] = ()
    tries: int = 1


class SteeredAnswer:
    """A reply in progress: iterate over its texts, once. `cancel`, from any thread, ends it early. calls:
    tool calls, known after the last text."""

    def __init__(
        self, model: SteeredModel, ask: Ask, steering: Steering, tools: Collection[str] = ()
    ) -> None:
        self._model, self.ask, self._tools = model, ask, tools
        self.applied, self.left_out = steering.applied, steering.left_out
        self.checked, self.tries = steering.checked, steering.tries
        self.calls: list[Call] = []
        self.ensured: Ensured | None = None
        self.finish_reason = ""
        self.timings: Timings | None = None
        self.n_prompt = self.n_reply = self.n_cached = 0
        self._cancelled = threading.Event()
        self._ticket: Ticket | None = None
        if not self.checked:
            self._ticket = model.scheduler.submit(ask)  # whose errors come before the first token

    def cancel(self) -> None:
        self._cancelled.set()
        if self._ticket is not None:
            self._ticket.cancel()

    def __iter__(self) -> Iterator[str]:
        with one_kind_of_error():
            yield from self._streamed() if self._ticket is not None else self._accepted()

    def _streamed(self) -> Iterator[str]:
        ticket, hold = self._ticket, CallHold() if self._tools else None
        try:
            for chunk in ticket:
                text = hold.push(chunk.text) if hold else chunk.text
                if text:
                    yield text
                if chunk.finish_reason:
                    self.finish_reason, self.timings = chunk.finish_reason, chunk.timings
            if hold:
                text, self.calls = calls_in(hold.rest(), self._tools)
                if text:
                    yield text
        finally:
            ticket.cancel()
            self.finish_reason = self.finish_reason or "cancelled"  # nobody read on
            self.n_prompt, self.n_reply, self.n_cached = (
                ticket.prompt_tokens,
                len(ticket.tokens),
                ticket.cached_tokens,
            )

    def _accepted(self) -> Iterator[str]:
        from localsteer.ensure import ensure

        ensured = ensure(
            self._model.scheduler, self.ask, self.checked, tries=self.tries, cancel=self._cancelled
        )
        reply = ensured.reply
        self.ensured, self.finish_reason, self.timings = ensured, reply.finish_reason, reply.timings
        self.n_prompt, self.n_reply = reply.timings.prompt_tokens, ensured.n_tokens
        yield reply.text

    def record(self) -> AnswerRecord:
        """What was done, for JSON; complete after the last text."""
        from localsteer.vector import settings_of

        record: AnswerRecord = {
            "steering": [settings_of(vector) for vector in self.applied],
            "seed": self.ask.sampling.seed,
            "finish_reason": self.finish_reason,
        }
        if self._ticket is not None and self._ticket.plain_tokens:
            record["plain_tokens"] = self._ticket.plain_tokens
        if self.left_out:
            record["left_out"] = [vector.name for vector in self.left_out]
        if self.ensured is not None:
            record["ensure"] = self.ensured.record()
        return record

    def unsteered(self) -> SteeredAnswer:
        """The plain reply to the same question, with the same seed."""
        with one_kind_of_error():
            return SteeredAnswer(self._model, replace(self.ask, steer=()), Steering(), self._tools)


@contextmanager
def one_kind_of_error() -> Iterator[None]:
    """Turn click's errors, and those of files that can't be read, into LocalsteerError."""
    try:
        yield
    except click.ClickException as error:
        raise LocalsteerError(" ".join(error.format_message().split())) from None
    except OSError as error:
        if error.filename is None:
            raise
        raise LocalsteerError(f"{error.filename} can't be used: {error.strerror or error}.") from None
