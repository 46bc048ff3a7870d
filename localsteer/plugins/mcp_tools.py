"""The tools of `localsteer mcp`, for any client of the Model Context Protocol.

Work runs in threads: the protocol is answered meanwhile, progress is reported, and a cancelled call ends its
work within a token. The protocol's package keeps stray output away from stdout.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import BaseModel, Field, ValidationError

from localsteer import __version__
from localsteer.cli.console import heard_by, in_one_line
from localsteer.cli.interrupt import EXIT_STATUS
from localsteer.errors import LocalsteerError, UnsupportedModelError
from localsteer.terms import Mode, Positions

from .steered import TRIES, SteeredAnswer, SteeredModel, SteeringWords, Wanted, listed_names

Result = TypeVar("Result")

READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
CLOSING_SECONDS = 5.0  # for calls under way, so that nothing is left half done
TELL_SECONDS = 0.2  # between two progress messages
INSTRUCTIONS = """localsteer steers local models: their replies are in JSON, lowercase, one sentence and so on
without a word of it in the prompt. list_vectors names what a model can be steered by."""

ModelName = Annotated[
    str | None, Field(description="A name from list_models, or a GGUF file; none: this server's model.")
]
Steer = Annotated[
    list[str],
    Field(
        description="What to steer by: ids from list_vectors, vector files (FILE.gguf:STRENGTH@LAYER), or an "
        "instruction in words. A vector that does not exist is made, which takes a minute or more."
    ),
]
Strength = Annotated[
    float | None, Field(allow_inf_nan=False, description="1 is the full effect, 0 none; none: as tuned.")
]
System = Annotated[str | None, Field(description="A system message before the prompt.")]


# --- what the tools answer ---------------------------------------------------------------------------------


class ModelRow(BaseModel):
    name: str
    path: str | None
    size: int | None = Field(description="bytes; none if the file has yet to be made")
    quantization: str | None
    architecture: str | None
    n_layer: int | None
    n_embd: int | None
    vectors: int = Field(description="how many instructions have a vector that ships for this model")
    note: str | None


class ModelRows(BaseModel):
    default: str
    models: list[ModelRow]


class AppliedVector(BaseModel):
    name: str
    layers: list[int]
    mode: str
    positions: str
    strength: float


class VectorRow(AppliedVector):
    source: str = Field(
        description="shipped: measured and shipped for this model; made: on first use, on this machine"
    )
    helps: bool
    shares: dict[str, float | None] | None = Field(
        description="shares of replies that follow: none (the plain model), steered, instructed (told), both"
    )


class InstructionRow(BaseModel):
    id: str
    text: str
    verifier: str | None = Field(description="what `verify` checks it by")


class VectorRows(BaseModel):
    model: str
    vectors: list[VectorRow]
    instructions: list[InstructionRow] = Field(description="ids whose vectors are made on first use")


class TokenCounts(BaseModel):
    prompt: int
    reply: int
    cached: int = Field(description="tokens of the prompt that came from the cache")


class SteeredReply(BaseModel):
    model: str
    text: str
    finish_reason: str
    steering: list[AppliedVector]
    left_out: list[str] = Field(
        description="vectors left out, because the prompt already asks and they then do harm"
    )
    seed: int
    tokens: TokenCounts
    plain: str | None = Field(description="the unsteered reply, with compare")
    ensure: dict[str, Any] | None = Field(description="what was tried, with ensure")


class TracedToken(BaseModel):
    text: str
    part: str = Field(description="prompt, last (the last one of the prompt) or generation")
    effect: float | None = Field(description="nats by which steering changes what the model says here")
    plain_text: str | None = Field(description="what the plain model would say here instead")


class TracedLine(BaseModel):
    vector: str
    layer: int
    share_before: float | None = Field(description="mean projection: 0 as without the instruction, 1 as with")
    share_after: float | None


class TracedReply(BaseModel):
    model: str
    reply: str
    finish_reason: str
    steering: list[AppliedVector]
    diagnosis: list[str]
    tokens: list[TracedToken]
    lines: list[TracedLine]


class TextVerdict(BaseModel):
    instruction_id: str
    kwargs: dict[str, Any]
    follows: bool = Field(description="by IFEval's strict rule")
    loose: bool = Field(description="by its loose rule, which forgives a greeting or bold type")


# --- work in threads ---------------------------------------------------------------------------------------


class StoppedError(Exception):
    """The call was cancelled, and nothing waits for its thread."""


class Work:
    """One call's work. `tell` is for its thread; `stop`, for any."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._stopped, self.ended = threading.Event(), threading.Event()
        self._on_stop: Callable[[], None] = lambda: None
        self._stage, self._what, self._progress, self._told = 0, "", 0.0, -math.inf

    def stop(self) -> None:
        self._stopped.set()
        self._on_stop()

    def check(self) -> None:
        """Raises StoppedError."""
        if self._stopped.is_set():
            raise StoppedError

    def tell(self, what: str, done: int, total: int) -> None:
        """Report progress, which grows by 1 with every stage of the work, since the protocol requires it to
        grow."""
        self.check()
        if what != self._what:
            self._stage, self._what, self._told = math.floor(self._progress) + 1, what, -math.inf
        now = time.monotonic()
        progress = self._stage + (min(done / total, 1.0) * 0.99 if total else 0.0)
        if progress <= self._progress or now - self._told < TELL_SECONDS:
            return
        self._progress, self._told = progress, now
        words = f"{what}: {done} of {total}" if total else what
        try:
            anyio.from_thread.run(self._context.report_progress, progress, None, words)
        except Exception:  # the connection is going: so is what this work was for
            self._stopped.set()
            raise StoppedError from None

    def read(self, answer: SteeredAnswer, what: str) -> str:
        """Yields the reply of an answer, which `stop` ends within a token."""
        self._on_stop = answer.cancel
        if self._stopped.is_set():
            answer.cancel()
        texts, most = [], answer.ask.max_tokens or 0
        for text in answer:
            texts.append(text)
            self.tell(what, len(texts), most)
        self.check()
        return "".join(texts)


class OpenModels:
    """The models that calls have named, with at most `most` of them open; the least recently used one is
    closed."""

    def __init__(self, most: int, loading: Mapping[str, Any]) -> None:
        self._most, self._loading = most, dict(loading)
        self._models: dict[str, SteeredModel] = {}  # the latest used last
        self._users: dict[str, int] = {}
        self._lock = threading.Lock()

    @contextmanager
    def using(self, name: str) -> Iterator[SteeredModel]:
        """The model of a name, opened if need be. Raises LocalsteerError if all others are at work, and for a
        name that means no model here, for which none is closed."""
        if name not in self._models:
            checked_file(name)
        with self._lock:
            model = self._models.pop(name, None)
            if model is None:
                self._make_room()
                model = SteeredModel(name, **self._loading)
            self._models[name] = model
            self._users[name] = self._users.get(name, 0) + 1
        try:
            yield model
        finally:
            with self._lock:
                self._users[name] -= 1
                if not (self._users[name] or model.is_open) and self._models.get(name) is model:
                    del self._models[name]  # it could not be opened

    def _make_room(self) -> None:
        while len(self._models) >= self._most:
            idle = next((name for name in self._models if not self._users[name]), None)
            if idle is None:
                raise UnsupportedModelError(
                    f"{self._most} models are at work, and no more can be open: try again later, or start "
                    "`localsteer mcp` with a larger --max-models."
                )
            self._models.pop(idle).close()

    def close(self) -> None:
        for model in self._models.values():
            model.close()


# --- the tools ---------------------------------------------------------------------------------------------


class SteeringTools:
    """Each public method is a tool; its signature is the schema, and clients show its docstring."""

    def __init__(self, model: str, models: OpenModels) -> None:
        self._default, self._models = model, models
        self._working: set[Work] = set()

    async def list_models(self) -> ModelRows:
        """List the local models that can be steered by name, with size, quantization and architecture."""
        return await anyio.to_thread.run_sync(self._model_rows)

    async def list_vectors(self, context: Context, model: ModelName = None) -> VectorRows:
        """List what a model can be steered by: vectors that are ready, with their measured figures, and the
        instructions for which one is made on first use."""
        return await self._work(context, lambda _work: vector_rows(model or self._default))

    async def complete(
        self,
        context: Context,
        prompt: Annotated[str, Field(description="The question, for the model's chat template.")],
        steer: Steer = [],  # noqa: B006
        model: ModelName = None,
        system: System = None,
        strength: Strength = None,
        layer: Annotated[str | None, Field(description="Layers to steer: 12, 3,4 or 3-5.")] = None,
        mode: Mode | None = None,
        positions: Positions | None = None,
        ensure: Annotated[
            list[str],
            Field(description="Like steer, but only if the plain reply fails the instruction's verifier."),
        ] = [],  # noqa: B006
        always_steer: Annotated[
            bool,
            Field(description="Steer even if the prompt already asks and steering is known to do harm then."),
        ] = False,
        compare: Annotated[bool, Field(description="Also return the plain reply.")] = False,
        max_tokens: Annotated[int, Field(ge=1, le=100_000)] = 256,
        temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.8,
        seed: int | None = None,
        stop: Annotated[list[str], Field(description="Texts before which the reply ends.")] = [],  # noqa: B006
        json_schema: Annotated[
            dict[str, Any] | None, Field(description="A JSON schema that the reply must follow.")
        ] = None,
    ) -> SteeredReply:
        """Answer a prompt with a steered local model: in JSON, lowercase, one sentence, or by anything in
        list_vectors, without asking for it in the prompt."""
        words = SteeringWords(
            steer=listed_names(steer),
            ensure=listed_names(ensure, "ensure"),
            tries=TRIES,
            always=always_steer,
            layer=layer,
            mode=mode,
            positions=positions,
            strength=strength,
        )
        wanted = Wanted(max_tokens, tuple(stop), drawing(temperature, seed, json_schema))
        messages = messages_of(prompt, system)

        def run(work: Work) -> SteeredReply:
            with self._models.using(model or self._default) as opened:
                answer = opened.ask(messages, words, wanted)
                text = work.read(answer, "reply")
                plain = work.read(answer.unsteered(), "plain reply") if compare else None
                return reply_of(opened.model, answer, text, plain)

        return await self._work(context, run)

    async def trace(
        self,
        context: Context,
        prompt: str,
        steer: Steer,
        model: ModelName = None,
        system: System = None,
        strength: Strength = None,
        max_tokens: Annotated[int, Field(ge=1, le=2048)] = 64,
        reply: Annotated[
            str | None, Field(description="Trace this reply instead of the steered model's.")
        ] = None,
    ) -> TracedReply:
        """Show what steering does to each token of a prompt and its greedy reply, and what that means."""
        words = SteeringWords(steer=listed_names(steer), strength=strength)
        if not words.steer:
            raise LocalsteerError("a trace needs something to steer by: name it in `steer`.")
        messages = messages_of(prompt, system)

        def run(work: Work) -> TracedReply:
            from localsteer.trace import trace as trace_reply

            with self._models.using(model or self._default) as opened:
                vectors, _checked = opened.vectors(words)
                with opened.scheduler.paused() as engine:
                    traced = trace_reply(
                        engine,
                        messages,
                        vectors,
                        max_tokens=max_tokens,
                        reply=reply,
                        on_token=work.check,
                        on_progress=lambda done, total: work.tell("tracing", done, total),
                    )
                return trace_of(opened.model, traced)

        return await self._work(context, run)

    async def verify(
        self,
        context: Context,
        text: Annotated[str, Field(description="The reply to check.")],
        instruction: Annotated[
            str, Field(description="An id from list_vectors, or one of IFEval's: startend:quotation.")
        ],
        kwargs: Annotated[
            dict[str, Any], Field(description='Its arguments: {"num_words": 50, "relation": "at least"}.')
        ] = {},  # noqa: B006
        prompt: Annotated[str | None, Field(description="The prompt, for instructions that need it.")] = None,
    ) -> TextVerdict:
        """Check whether a text follows an instruction, by IFEval's verifiers; no model is asked."""
        return await self._work(context, lambda _work: verdict(text, instruction, kwargs, prompt))

    async def _work(self, context: Context, function: Callable[[Work], Result]) -> Result:
        work = Work(context)
        self._working.add(work)

        def run() -> Result | None:
            try:
                # of a call that was cancelled, nobody takes the result
                with suppress(StoppedError), heard_by(work.tell):
                    return function(work)
            finally:
                work.ended.set()

        try:
            return await anyio.to_thread.run_sync(run, abandon_on_cancel=True)
        finally:  # cancelled or done
            work.stop()
            self._working.discard(work)

    def _model_rows(self) -> ModelRows:
        from localsteer.model_list import named_models

        names = {"quantization", "architecture", "n_layer", "n_embd"}
        rows = [row.to_dict() for row in named_models()]
        return ModelRows(
            default=self._default,
            models=[
                ModelRow(
                    **{key: row[key] for key in ("name", "path", "size", "note", *names)}, vectors=row["pack"]
                )
                for row in rows
            ],
        )

    def stop(self, seconds: float = 0.0) -> None:
        """End all work, for the end of the process, and wait so long for what it clears away."""
        working, until = list(self._working), time.monotonic() + seconds
        for work in working:
            work.stop()
        for work in working:
            work.ended.wait(max(0.0, until - time.monotonic()))


def checked_file(model: str) -> Path:
    """The GGUF of a model whose header can be read. Raises LocalsteerError, also for one that would have to
    be fetched: that is for the user to decide, not for whoever calls a tool."""
    from localsteer.cli.models import model_file
    from localsteer.model_list import read_shape

    path = model_file(model, download=False)
    read_shape(path)
    return path


def messages_of(prompt: str, system: str | None) -> list[dict[str, str]]:
    said = [{"role": "system", "content": system}] if system else []
    return [*said, {"role": "user", "content": prompt}]


def drawing(temperature: float, seed: int | None, schema: dict[str, Any] | None) -> dict[str, Any]:
    """Fields of Sampling."""
    from localsteer.constrain import Constraint

    settings: dict[str, Any] = {"temp": temperature, "seed": seed}
    return settings if schema is None else settings | {"grammar": Constraint.json_schema(schema)}


def reply_of(model: str, answer: SteeredAnswer, text: str, plain: str | None) -> SteeredReply:
    record = answer.record()
    return SteeredReply(
        model=model,
        text=text,
        finish_reason=record["finish_reason"],
        steering=record["steering"],
        left_out=record.get("left_out", []),
        seed=record["seed"],
        tokens=TokenCounts(prompt=answer.n_prompt, reply=answer.n_reply, cached=answer.n_cached),
        plain=plain,
        ensure=record.get("ensure"),
    )


def trace_of(model: str, made: Any) -> TracedReply:
    """made: a Trace."""
    from localsteer.vector import settings_of

    document = made.to_dict()
    tokens = [
        TracedToken(
            text=token["text"], part=token["class"], effect=effect, plain_text=token.get("plain_text") or None
        )
        for token, effect in zip(document["tokens"], document["effect"], strict=True)
    ]
    lines = [
        TracedLine(
            vector=line.vector.label,
            layer=line.layer,
            share_before=_mean(line.share(line.before)),
            share_after=_mean(line.share(line.after)),
        )
        for line in made.lines
    ]
    return TracedReply(
        model=model,
        reply=document["reply"],
        finish_reason=document["finish_reason"],
        steering=[AppliedVector(**settings_of(vector)) for vector in made.vectors],
        diagnosis=[finding["text"] for finding in document["diagnosis"]],
        tokens=tokens,
        lines=lines,
    )


def _mean(values: Any) -> float | None:
    import numpy as np

    there = values[np.isfinite(values)]
    return round(float(there.mean()), 4) if len(there) else None


def vector_rows(model: str) -> VectorRows:
    """Of the packs, of the cache, and the catalogue's instructions. Raises LocalsteerError."""
    from localsteer.cli.models import catalog_of
    from localsteer.packs import pack_for

    path = checked_file(model)
    match = pack_for(path)
    shipped = [] if match is None else [_shipped_row(entry) for entry in match.pack.instructions.values()]
    catalog = catalog_of(model, None)
    return VectorRows(
        model=model,
        vectors=[*shipped, *_made_rows(path)],
        instructions=[
            InstructionRow(
                id=instruction.id, text=next(iter(instruction.phrasings), ""), verifier=instruction.verifier
            )
            for instruction in catalog.instructions.values()
        ],
    )


def _shipped_row(entry: Any) -> VectorRow:
    settings = {**entry.settings, "layers": list(entry.settings["layers"])}
    return VectorRow(
        name=entry.id, source="shipped", helps=entry.helps, shares=dict(entry.scores), **settings
    )


def _made_rows(path: Path) -> list[VectorRow]:
    from localsteer.cache import cached_vectors, file_hash
    from localsteer.vector import ControlVector, settings_of

    rows = []
    for file in cached_vectors(file_hash(path)):
        with suppress(LocalsteerError):  # one that can't be read is made again when it is asked for
            vector = ControlVector.load(file)
            helps = vector.strength != 0
            rows.append(VectorRow(**settings_of(vector), source="made", helps=helps, shares=None))
    return rows


def verdict(text: str, instruction: str, kwargs: Mapping[str, Any], prompt: str | None) -> TextVerdict:
    """Raises LocalsteerError for an id that is neither the catalogue's nor IFEval's, and for arguments."""
    from localsteer.catalog import load_catalog
    from localsteer.verify import check_arguments, verify

    known = load_catalog().instructions
    given = dict(kwargs)
    if instruction in known:
        entry = load_catalog().get(instruction)
        if entry.verifier is None:
            raise LocalsteerError(
                f"{instruction!r} has no verifier: nothing can judge whether a text follows it."
            )
        given = {**entry.kwargs_for(prompt or ""), **given}
        instruction = entry.verifier
    arguments = check_arguments(instruction, given, prompt=prompt)
    strict, loose = (verify(instruction, text, arguments, loose=rule) for rule in (False, True))
    return TextVerdict(instruction_id=instruction, kwargs=arguments, follows=strict, loose=loose)


# --- the server --------------------------------------------------------------------------------------------


class OneLineServer(MCPServer):
    """Answers a client's mistakes in one line, like all errors of localsteer."""

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Any = None) -> Any:
        known = {tool.name: tool.input_schema["properties"] for tool in await self.list_tools()}
        if name not in known:
            raise ToolError(f"there is no tool {name!r:.80}: {', '.join(known)}.")
        unknown = set(arguments) - set(known[name])
        if unknown:  # unknown arguments are not ignored silently
            taken = ", ".join(known[name]) or "it takes none"
            raise ToolError(f"{name} has no argument {min(unknown)!r:.80}: {taken}.")
        try:
            return await super().call_tool(name, arguments, context)
        except ToolError as error:
            cause = error.__cause__
            if isinstance(cause, ValidationError):
                raise ToolError(f"{name}: {_first_of(cause)}") from cause
            if isinstance(cause, LocalsteerError):
                raise ToolError(in_one_line(cause)) from cause
            raise


def _first_of(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def server_of(tools: SteeringTools) -> MCPServer:
    server = OneLineServer("localsteer", version=__version__, instructions=INSTRUCTIONS, log_level="WARNING")
    for function in (tools.list_models, tools.list_vectors, tools.complete, tools.trace, tools.verify):
        server.add_tool(function, annotations=READS)
    return server


def serve_stdio(model: str, *, max_models: int = 2, **loading: Any) -> None:
    """Serve until stdin ends. Raises BrokenPipeError if nobody reads stdout any more, but no LocalsteerError:
    errors of a call are returned to it."""
    models = OpenModels(max_models, loading)
    tools = SteeringTools(model, models)

    def close() -> None:
        tools.stop(CLOSING_SECONDS)
        models.close()

    try:
        with ended_by_ctrl_c(close):
            anyio.run(server_of(tools).run_stdio_async)
    except Exception as error:
        if not _is_broken_pipe(error):
            raise
        raise BrokenPipeError from None
    finally:
        close()


@contextmanager
def ended_by_ctrl_c(close: Callable[[], None]) -> Iterator[None]:
    """The event loop would wait for the thread that reads stdin, and so for the client."""
    before = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if before is signal.SIG_IGN or not in_main_thread:
        yield
        return
    presses: list[int] = []

    def end() -> None:
        with suppress(Exception):
            close()
        os._exit(EXIT_STATUS)

    def on_press(number: int, _frame: Any) -> None:
        presses.append(number)
        if len(presses) > 1:  # it was not quick enough
            os._exit(EXIT_STATUS)
        threading.Thread(target=end, daemon=True).start()

    signal.signal(signal.SIGINT, on_press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _is_broken_pipe(error: BaseException) -> bool:
    """Whether this is all that a group of errors has in it."""
    parts = getattr(error, "exceptions", ())
    return all(map(_is_broken_pipe, parts)) if parts else isinstance(error, BrokenPipeError)
