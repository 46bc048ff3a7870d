"""The plugin of the program `llm` (https://llm.datasette.io): its models are those that `-m` takes.

    llm -m localsteer/smol -o steer json "Tell me about foxes."

llm imports every plugin at each start, so nothing heavy is imported before a model is prompted.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import math
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import llm
from pydantic import Field

from localsteer.cache import atomic_path
from localsteer.cli.console import in_one_line
from localsteer.errors import LocalsteerError
from localsteer.model_names import BUNDLED, PACKAGED, packaged_file
from localsteer.stores import is_stored_name, within
from localsteer.terms import Mode, Positions
from localsteer.tool_calls import loaded

if TYPE_CHECKING:
    from .steered import SteeredAnswer, SteeredModel, SteeringWords, Wanted

PREFIX = "localsteer/"
FILE = "localsteer-models.json"  # in llm's folder: model ids -> what -m takes
SEEN = "localsteer-seen.json"  # beside it: the names of other programs' models, if there are many
STORES_SECONDS = 0.08  # at each start of llm, for searching the folders of other programs
LLM_WANTED = "0.36"


@llm.hookimpl
def register_models(register: Any) -> None:
    for model_id, model in known_models().items():
        register(Steered(model_id, model), AsyncSteered(model_id, model))


def known_models() -> dict[str, str]:
    """{id in llm: what -m takes} for the named models on this machine, those of other programs, and added
    ones."""
    names = [*BUNDLED, *(name for name in PACKAGED if packaged_file(name)), *stored_names()]
    try:
        added = added_models()
    except LocalsteerError as error:  # llm works without them
        click.echo(f"localsteer: {in_one_line(error)}", err=True)
        added = {}
    return {f"{PREFIX}{name}": name for name in names} | added


def stored_names(seconds: float | None = None) -> list[str]:
    """Names of complete models in the folders of other programs. What is not found in this time is taken from
    the last full search (`llm localsteer models`)."""
    models, is_all = within(STORES_SECONDS if seconds is None else seconds)
    names = dict.fromkeys(model.name for model in models if not model.fault)
    if not is_all:
        with suppress(OSError, ValueError, RecursionError):
            kept = json.loads((llm.user_dir() / SEEN).read_text("utf-8"))
            names |= dict.fromkeys(name for name in kept if isinstance(name, str) and is_stored_name(name))
    return list(names)


def see_everything() -> None:
    """Search the folders of other programs completely, and keep the names if that takes long."""
    file = llm.user_dir() / SEEN
    began = time.monotonic()
    names = stored_names(math.inf)
    if time.monotonic() - began > STORES_SECONDS / 2:
        with atomic_path(file) as temporary:
            temporary.write_text(json.dumps(names, indent=2) + "\n", "utf-8")
    else:
        file.unlink(missing_ok=True)


# --- options -----------------------------------------------------------------------------------------------


class SteeringOptions(llm.Options):
    """What `-o NAME VALUE` takes."""

    steer: str | list[str] | None = Field(
        None,
        description="What to steer by: an instruction's id, your own words, or a vector file; several as "
        "json+lowercase, or as a JSON list. A vector that does not exist yet is made.",
    )
    ensure: str | list[str] | None = Field(
        None,
        description="The same, but only if the plain reply fails its verifier; the reply comes in one piece.",
    )
    tries: int | None = Field(
        None, ge=1, description="At most this many replies with ensure, including the plain one. Default: 3."
    )
    strength: float | None = Field(
        None, allow_inf_nan=False, description="1 is the full effect, 0 none; json:0.8 sets it for one."
    )
    layer: int | str | None = Field(None, description="Layers to steer: 12, 3,4 or 3-5.")
    mode: Mode | None = Field(None, description="What is done to the residual stream.")
    positions: Positions | None = Field(None, description="Which tokens are steered.")
    always_steer: bool | None = Field(
        None,
        description="Apply a vector even if the prompt already asks and its file says that "
        "it then does harm.",
    )
    temperature: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="0 is greedy. Default: 0.8."
    )
    max_tokens: int | None = Field(
        None, ge=-1, description="Longest reply, in tokens; -1 = until the context is full. Default: 512."
    )
    seed: int | None = Field(None, description="The same seed gives the same reply.")
    top_k: int | None = Field(None, description="0 = off. Default: 40.")
    top_p: float | None = Field(None, ge=0, le=1, description="1 = off. Default: 0.95.")
    min_p: float | None = Field(None, ge=0, le=1, description="0 = off. Default: 0.05.")
    repeat_penalty: float | None = Field(None, gt=0, allow_inf_nan=False, description="1 = off. Default: 1.")
    presence_penalty: float | None = Field(None, allow_inf_nan=False, description="Default: 0 = off.")
    frequency_penalty: float | None = Field(None, allow_inf_nan=False, description="Default: 0 = off.")
    stop: str | list[str] | None = Field(
        None, description="The reply ends before this text; several as a JSON list."
    )
    tool_choice: str | None = Field(
        None,
        description="How your question must be answered if tools are offered: required = a call of "
        "one of them, or the name of one. Default: auto = as the model likes.",
    )
    steer_forms: bool | None = Field(
        None, description="Also steer inside tool calls and under a schema, which otherwise stay plain."
    )
    ctx_size: int | None = Field(
        None, ge=0, description="Tokens of prompt and reply. Default: what the model allows, at most 4096."
    )
    threads: int | None = Field(None, ge=1, description="CPU threads.")
    gpu_layers: int | None = Field(None, description="Layers to keep on a GPU. Default: 0.")


SAMPLING = {
    "temp": "temperature",
    **{name: name for name in ("top_k", "top_p", "min_p", "repeat_penalty", "seed")},
    **{name: name for name in ("presence_penalty", "frequency_penalty")},
}
LOADING = ("ctx_size", "threads", "gpu_layers")


def words_of(options: SteeringOptions) -> SteeringWords:
    from .steered import SETTINGS, TRIES, SteeringWords, listed_names

    _refuse_idle(options)
    return SteeringWords(
        steer=listed_names(options.steer),
        ensure=listed_names(options.ensure, "ensure"),
        tries=options.tries or TRIES,
        always=bool(options.always_steer),
        **{name: getattr(options, name) for name in SETTINGS},
    )


def _refuse_idle(options: SteeringOptions) -> None:
    """Raise LocalsteerError for an option that would do nothing."""
    needs = {
        "tries": (options.ensure, "ensure"),
        "always_steer": (options.steer, "steer"),
        "steer_forms": (options.steer or options.ensure, "steer or ensure"),
    }
    for name, (value, need) in needs.items():
        if getattr(options, name) and value is None:
            raise LocalsteerError(f"{name} needs {need}: name an instruction or a vector file.")


def wanted_of(prompt: llm.Prompt, messages: list[dict[str, Any]]) -> Wanted:
    from localsteer.constrain import Constraint
    from localsteer.runtime.ask import MAX_TOKENS

    from .steered import Wanted

    options = prompt.options
    sampling = {name: getattr(options, option) for name, option in SAMPLING.items()}
    sampling["grammar"] = None if prompt.schema is None else Constraint.json_schema(prompt.schema)
    most = MAX_TOKENS if options.max_tokens is None else options.max_tokens
    return Wanted(
        max_tokens=None if most < 0 else most,
        stop=_stops(options.stop),
        sampling={name: value for name, value in sampling.items() if value is not None},
        tools=tuple(map(function_of, prompt.tools)),
        # a tool's result must not be answered with another call, or this would never end
        tool_choice=None if messages[-1:] and messages[-1]["role"] == "tool" else options.tool_choice,
        steer_forms=bool(options.steer_forms),
    )


def function_of(tool: llm.Tool) -> dict[str, Any]:
    """A tool as chat templates take it."""
    function = {"name": tool.name, "description": tool.description or ""}
    parameters = tool.input_schema or {"type": "object", "properties": {}}
    if "properties" in parameters:  # schema for a function's arguments, which would not take any others
        parameters = {"additionalProperties": False, **parameters}
    return {"type": "function", "function": {**function, "parameters": parameters}}


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    if isinstance(stop, str) and stop.startswith("["):
        try:
            stops = json.loads(stop)
        except (ValueError, RecursionError):
            stops = stop  # a text that begins so
        stop = stops if isinstance(stops, list) and all(isinstance(text, str) for text in stops) else stop
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


# --- the models --------------------------------------------------------------------------------------------


class SteeredByOptions:
    """What the model and its asynchronous version share."""

    can_stream = True
    supports_schema = True
    supports_tools = True
    Options = SteeringOptions

    def __init__(self, model_id: str, model: str) -> None:
        self.model_id, self.model = model_id, model

    def __str__(self) -> str:
        return f"localsteer: {self.model_id}"

    def begin(self, prompt: llm.Prompt) -> SteeredAnswer:
        options = prompt.options
        loading = {name: getattr(options, name) for name in LOADING}
        messages = messages_of(prompt)
        words, wanted = words_of(options), wanted_of(prompt, messages)
        return opened(self.model, **loading).ask(messages, words, wanted)


class Steered(SteeredByOptions, llm.Model):
    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.Response,
        conversation: llm.Conversation | None,
    ) -> Iterator[str]:
        with llms_error():
            answer = self.begin(prompt)
            try:
                yield from answer
            finally:
                tell(response, answer)


class AsyncSteered(SteeredByOptions, llm.AsyncModel):
    async def _begun(self, prompt: llm.Prompt) -> SteeredAnswer:
        left = threading.Event()

        def begin() -> SteeredAnswer:
            answer = self.begin(prompt)  # which may open a model, and make a vector
            if left.is_set():
                answer.cancel()  # nobody would read it
            return answer

        try:
            return await asyncio.to_thread(begin)
        except asyncio.CancelledError:
            left.set()
            raise

    async def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.AsyncResponse,
        conversation: llm.AsyncConversation | None,
    ) -> AsyncIterator[str]:
        with llms_error():
            answer = await self._begun(prompt)
            texts = iter(answer)
            try:
                while (text := await asyncio.to_thread(next, texts, None)) is not None:
                    yield text
            finally:
                answer.cancel()
                tell(response, answer)


@contextmanager
def llms_error() -> Iterator[None]:
    """Turn errors that a user can cause into the form that llm shows in one line."""
    try:
        yield
    except LocalsteerError as error:
        raise llm.ModelError(in_one_line(error)) from None


def tell(response: Any, answer: SteeredAnswer) -> None:
    """Pass on the calls that llm should make, and what `llm logs` keeps: tokens, and what the reply was
    steered by."""
    for call in answer.calls:
        found = loaded(call.arguments)
        # anything but an object is passed on, as llm does: the tool's refusal goes back to the model
        arguments = found if isinstance(found, dict) else {"_raw": call.arguments}
        response.add_tool_call(llm.ToolCall(call.name, arguments))
    response.set_usage(
        input=answer.n_prompt,
        output=answer.n_reply,
        details={"cached_tokens": answer.n_cached} if answer.n_cached else None,
    )
    response.response_json = answer.record()


def messages_of(prompt: llm.Prompt) -> list[dict[str, Any]]:
    """The whole conversation, as chat templates read it. Raises LocalsteerError for anything but text."""
    if not hasattr(prompt, "messages"):
        raise LocalsteerError(f"llm {LLM_WANTED} or newer is required: pip install -U llm")
    return [rendered for message in prompt.messages for rendered in _template_messages(message)]


def _template_messages(message: Any) -> Iterator[dict[str, Any]]:
    """One of llm's messages as messages for a template: the results of several tools become one message
    each."""
    texts, calls = [], []
    for part in message.parts:
        kind = type(part).__name__
        if kind == "TextPart":
            texts.append(part.text)
        elif kind == "ToolCallPart":
            function = {"name": part.name, "arguments": part.arguments}
            calls.append({"type": "function", "function": function} | _id_of(part, "id"))
        elif kind == "ToolResultPart" and not part.attachments:
            answer = {"role": "tool", "name": part.name, "content": str(part.output or "")}
            yield answer | _id_of(part, "tool_call_id")
        elif kind != "ReasoningPart":  # which templates leave out of earlier turns
            what = "an attachment" if kind in ("AttachmentPart", "ToolResultPart") else f"a {kind}"
            raise LocalsteerError(
                f"localsteer reads only text, and this conversation has {what}: begin a new one."
            )
    if texts or calls or message.role != "tool":
        yield {"role": message.role, "content": "".join(texts), **({"tool_calls": calls} if calls else {})}


def _id_of(part: Any, key: str) -> dict[str, str]:
    return {} if part.tool_call_id is None else {key: part.tool_call_id}


_opened: dict[str, SteeredModel] = {}
_opening = threading.Lock()


def opened(model: str, **loading: int | None) -> SteeredModel:
    """The model, open since it was first asked in this process; opened again for other options."""
    from .steered import SteeredModel

    asked = SteeredModel(model, **loading)
    with _opening:
        known = _opened.get(model)
        if known is not None and known.loading == asked.loading:
            return known
        if known is not None:
            known.close()
        else:
            atexit.register(close, model)  # before Python frees what the decoding thread works on
        _opened[model] = asked
    return asked


def close(model: str) -> None:
    """Free what `opened` holds."""
    known = _opened.pop(model, None)
    if known is not None:
        known.close()


# --- llm localsteer ... ------------------------------------------------------------------------------------


@llm.hookimpl
def register_commands(cli: click.Group) -> None:
    @cli.group("localsteer")
    def group() -> None:
        """Models that localsteer steers, and names for further files"""

    @group.command("models")
    def models_command() -> None:
        """List the models with their files."""
        with clicks_error():
            see_everything()
        for model_id, model in known_models().items():
            click.echo(f"{model_id}: {model}")

    @group.command("add-model")
    @click.argument("model")
    @click.option("--name", metavar="NAME", help="The name after localsteer/. [default: that of the file]")
    def add_command(model: str, name: str | None) -> None:
        """Add MODEL, a GGUF file or a name with a quantization, to llm's models.

        \b
        Examples:
          llm localsteer add-model models/Qwen3-4B-Q4_K_M.gguf --name qwen
          llm localsteer add-model bundled:Q4_K_M
        """
        with clicks_error():
            click.echo(f"{add_model(model, name)}: added.")

    @group.command("remove-model")
    @click.argument("model_id")
    def remove_command(model_id: str) -> None:
        """Remove an added model from llm's models; its file stays."""
        with clicks_error():
            click.echo(f"{remove_model(model_id)}: forgotten.")


@contextmanager
def clicks_error() -> Iterator[None]:
    try:
        yield
    except LocalsteerError as error:
        raise click.ClickException(in_one_line(error)) from None


def models_file() -> Path:
    return llm.user_dir() / FILE


def added_models() -> dict[str, str]:
    """The added models. Raises LocalsteerError if their file can't be read."""
    try:
        added = json.loads(models_file().read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or "no JSON"
        raise LocalsteerError(f"{models_file()} can't be read ({why}): repair or remove it.") from None
    is_table = isinstance(added, dict) and all(isinstance(model, str) for model in added.values())
    if not is_table:
        raise LocalsteerError(f"{models_file()} is not a table of names and models: repair or remove it.")
    return added


def add_model(model: str, name: str | None = None) -> str:
    """Add a model; returns its id. Raises LocalsteerError for a file that is not a model, and for an id in
    use."""
    from localsteer.model_list import read_shape
    from localsteer.model_names import is_named, path_of

    named = is_named(model)
    path = path_of(model, on_making=partial(click.echo, err=True))
    read_shape(path)
    kept = model if named else str(path.resolve())
    model_id = PREFIX + (name or (model if named else path.stem)).removeprefix(PREFIX)
    if any(map(str.isspace, model_id)) or model_id == PREFIX or not model_id.isprintable():
        raise LocalsteerError(
            f"{model_id!r:.80} is empty or contains a blank or a control character: choose another --name."
        )
    known = known_models()
    if known.get(model_id, kept) != kept:
        raise LocalsteerError(f"{model_id} already means {known[model_id]}: choose another --name.")
    write_models({**added_models(), model_id: kept})
    return model_id


def remove_model(model_id: str) -> str:
    """Remove an added model. Raises LocalsteerError for one that was not added."""
    added = added_models()
    full = model_id if model_id in added else PREFIX + model_id
    if full not in added:
        raise LocalsteerError(f"{model_id!r} was not added: {', '.join(added) or 'none was'}.")
    write_models({key: model for key, model in added.items() if key != full})
    return full


def write_models(models: dict[str, str]) -> None:
    with atomic_path(models_file()) as temporary:
        temporary.write_text(json.dumps(models, indent=2) + "\n", "utf-8")
