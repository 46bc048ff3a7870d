"""The plugin of the program `llm` (https://llm.datasette.io): its models are those that `-m` takes.

    llm -m localsteer/smol -o steer json "Tell me about foxes."

llm imports every plugin at each start, so nothing heavy is imported before a model is asked.
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
SEEN = "localsteer-seen.json"  # beside it: the names of other programs' models, where there are many
STORES_SECONDS = 0.08  # at each start of llm, for looking through the folders of other programs
LLM_WANTED = "0.36"


@llm.hookimpl
def register_models(register: Any) -> None:
    for model_id, model in known_models().items():
        register(Steered(model_id, model), AsyncSteered(model_id, model))


def known_models() -> dict[str, str]:
    """{id in llm: what -m takes} of the named models that are here, of those of other programs, and of those
    that were added."""
    names = [*BUNDLED, *(name for name in PACKAGED if packaged_file(name)), *stored_names()]
    try:
        added = added_models()
    except LocalsteerError as error:  # llm works on without them
        click.echo(f"localsteer: {in_one_line(error)}", err=True)
        added = {}
    return {f"{PREFIX}{name}": name for name in names} | added


def stored_names(seconds: float | None = None) -> list[str]:
    """Of models in the folders of other programs that are whole. What is not seen in this time is taken from
    the last look at everything (`llm localsteer models`)."""
    models, is_all = within(STORES_SECONDS if seconds is None else seconds)
    names = dict.fromkeys(model.name for model in models if not model.fault)
    if not is_all:
        with suppress(OSError, ValueError, RecursionError):
            kept = json.loads((llm.user_dir() / SEEN).read_text("utf-8"))
            names |= dict.fromkeys(name for name in kept if isinstance(name, str) and is_stored_name(name))
    return list(names)


def see_everything() -> None:
    """Look through the folders of other programs to the end, and keep the names where that takes long."""
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
        "json+lowercase, or as a JSON list. A vector that is not there yet is made.",
    )
    ensure: str | list[str] | None = Field(
        None,
        description="The same, only where the plain reply fails its verifier; it comes in one piece.",
    )
    tries: int | None = Field(
        None, ge=1, description="Replies at most with ensure, the plain one included. Default: 3."
    )
    strength: float | None = Field(
        None, allow_inf_nan=False, description="1 is the full effect, 0 none; json:0.8 sets it for one."
    )
    layer: int | str | None = Field(None, description="Layers to steer: 12, 3,4 or 3-5.")
    mode: Mode | None = Field(None, description="What is done to the residual stream.")
    positions: Positions | None = Field(None, description="Which tokens are steered.")
    always_steer: bool | None = Field(
        None, description="Also by a vector whose file says that it does harm where the prompt asks already."
    )
    temperature: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="0 is greedy. Default: 0.8."
    )
    max_tokens: int | None = Field(
        None, ge=-1, description="Of the reply; -1 = until the context is full. Default: 512."
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
        description="What your question must be answered with, where tools are offered: required = a call of "
        "one of them, or the name of one. Default: auto = as the model likes.",
    )
    steer_forms: bool | None = Field(
        None, description="Steer inside of tool calls and under a schema as well, which stay plain otherwise."
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

    return SteeringWords(
        steer=listed_names(options.steer),
        ensure=listed_names(options.ensure, "ensure"),
        tries=options.tries or TRIES,
        always=bool(options.always_steer),
        **{name: getattr(options, name) for name in SETTINGS},
    )


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
        # a tool's answer is not to be answered with a call again, or this would never end
        tool_choice=None if messages[-1:] and messages[-1]["role"] == "tool" else options.tool_choice,
        steer_forms=bool(options.steer_forms),
    )


def function_of(tool: llm.Tool) -> dict[str, Any]:
    """As chat templates are given a tool."""
    function = {"name": tool.name, "description": tool.description or ""}
    parameters = tool.input_schema or {"type": "object", "properties": {}}
    if "properties" in parameters:  # of a function's arguments, which would not take any other
        parameters = {"additionalProperties": False, **parameters}
    return {"type": "function", "function": {**function, "parameters": parameters}}


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    if isinstance(stop, str) and stop.startswith("["):
        try:
            found = json.loads(stop)
        except (ValueError, RecursionError):
            found = stop  # a text that begins so
        stop = found if isinstance(found, list) and all(isinstance(text, str) for text in found) else stop
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


# --- the models --------------------------------------------------------------------------------------------


class SteeredByOptions:
    """What the model and its asynchronous twin share."""

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
    """What a user can cause, in the form that llm shows in one line."""
    try:
        yield
    except LocalsteerError as error:
        raise llm.ModelError(in_one_line(error)) from None


def tell(response: Any, answer: SteeredAnswer) -> None:
    """The calls that llm is to make, and what `llm logs` keeps: tokens, what the reply was steered by."""
    for call in answer.calls:
        found = loaded(call.arguments)
        # what is no object is passed on as llm itself does it: the tool's refusal goes back to the model
        arguments = found if isinstance(found, dict) else {"_raw": call.arguments}
        response.add_tool_call(llm.ToolCall(call.name, arguments))
    response.set_usage(
        input=answer.n_prompt,
        output=answer.n_reply,
        details={"cached_tokens": answer.n_cached} if answer.n_cached else None,
    )
    response.response_json = answer.record()


def messages_of(prompt: llm.Prompt) -> list[dict[str, Any]]:
    """The whole conversation, as chat templates read it. Raises LocalsteerError for what is no text."""
    if not hasattr(prompt, "messages"):
        raise LocalsteerError(f"llm {LLM_WANTED} or newer is wanted: pip install -U llm")
    return [made for message in prompt.messages for made in _template_messages(message)]


def _template_messages(message: Any) -> Iterator[dict[str, Any]]:
    """A message of llm's may hold the answers of several tools, which are one message each in a template."""
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
            raise LocalsteerError(f"localsteer reads texts, and this conversation has {what}: begin another.")
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
        """Models that localsteer steers, and files that llm should know by a name"""

    @group.command("models")
    def models_command() -> None:
        """List the models, and what is behind each."""
        with clicks_error():
            see_everything()
        for model_id, model in known_models().items():
            click.echo(f"{model_id}: {model}")

    @group.command("add-model")
    @click.argument("model")
    @click.option("--name", metavar="NAME", help="Its name after localsteer/. [default: that of the file]")
    def add_command(model: str, name: str | None) -> None:
        """Let llm know MODEL, a GGUF file or a name with a quantization.

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
        """Let llm forget a model that was added; its file stays."""
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
    """Raises LocalsteerError for a file that can't be read."""
    try:
        found = json.loads(models_file().read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or "no JSON"
        raise LocalsteerError(f"{models_file()} can't be read ({why}): repair or remove it.") from None
    is_table = isinstance(found, dict) and all(isinstance(model, str) for model in found.values())
    if not is_table:
        raise LocalsteerError(f"{models_file()} is no table of names and models: repair or remove it.")
    return found


def add_model(model: str, name: str | None = None) -> str:
    """The id. Raises LocalsteerError for a file that is no model, and for an id that is another's."""
    from localsteer.model_list import read_shape
    from localsteer.model_names import is_named, path_of

    named = is_named(model)
    path = path_of(model, on_making=partial(click.echo, err=True))
    read_shape(path)
    kept = model if named else str(path.resolve())
    model_id = PREFIX + (name or (model if named else path.stem)).removeprefix(PREFIX)
    if any(map(str.isspace, model_id)) or model_id == PREFIX or not model_id.isprintable():
        raise LocalsteerError(
            f"{model_id!r:.80} has a blank or a control character in it, or nothing: choose another --name."
        )
    known = known_models()
    if known.get(model_id, kept) != kept:
        raise LocalsteerError(f"{model_id} is {known[model_id]} already: choose another --name.")
    write_models({**added_models(), model_id: kept})
    return model_id


def remove_model(model_id: str) -> str:
    """Raises LocalsteerError for one that was not added."""
    added = added_models()
    full = model_id if model_id in added else PREFIX + model_id
    if full not in added:
        raise LocalsteerError(f"{model_id!r} was not added: {', '.join(added) or 'none was'}.")
    write_models({key: model for key, model in added.items() if key != full})
    return full


def write_models(models: dict[str, str]) -> None:
    with atomic_path(models_file()) as temporary:
        temporary.write_text(json.dumps(models, indent=2) + "\n", "utf-8")
