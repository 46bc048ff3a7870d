"""The plugin of the program `llm` (https://llm.datasette.io): its models are those that `-m` takes.

    llm -m localsteer/smol -o steer json "Tell me about foxes."

llm imports every plugin at each start, so nothing heavy is imported before a model is asked.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import llm
from pydantic import Field

from localsteer.errors import LocalsteerError
from localsteer.model_names import BUNDLED, PACKAGED, packaged_file
from localsteer.terms import Mode, Positions

if TYPE_CHECKING:
    from .steered import SteeredAnswer, SteeredModel, SteeringWords, Wanted

PREFIX = "localsteer/"
FILE = "localsteer-models.json"  # in llm's folder: model ids -> what -m takes
LLM_WANTED = "0.36"


@llm.hookimpl
def register_models(register: Any) -> None:
    for model_id, model in known_models().items():
        register(Steered(model_id, model), AsyncSteered(model_id, model))


def known_models() -> dict[str, str]:
    """{id in llm: what -m takes} of the named models that are here, and of those that were added."""
    names = [*BUNDLED, *(name for name in PACKAGED if packaged_file(name))]
    try:
        added = added_models()
    except LocalsteerError as error:  # llm works on without them
        click.echo(f"localsteer: {error}", err=True)
        added = {}
    return {f"{PREFIX}{name}": name for name in names} | added


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
    layer: int | str | None = Field(None, description="Blocks to steer: 12, 3,4 or 3-5.")
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
    ctx_size: int | None = Field(
        None, ge=0, description="Tokens of prompt and reply. Default: what the model allows, at most 4096."
    )
    threads: int | None = Field(None, ge=1, description="CPU threads.")
    gpu_layers: int | None = Field(None, description="Blocks to keep on a GPU. Default: 0.")


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


def wanted_of(options: SteeringOptions, schema: dict[str, Any] | None) -> Wanted:
    from localsteer.constrain import Constraint
    from localsteer.runtime.ask import MAX_TOKENS

    from .steered import Wanted

    sampling = {name: getattr(options, option) for name, option in SAMPLING.items()}
    sampling["grammar"] = None if schema is None else Constraint.json_schema(schema)
    most = MAX_TOKENS if options.max_tokens is None else options.max_tokens
    return Wanted(
        max_tokens=None if most < 0 else most,
        stop=_stops(options.stop),
        sampling={name: value for name, value in sampling.items() if value is not None},
    )


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
    Options = SteeringOptions

    def __init__(self, model_id: str, model: str) -> None:
        self.model_id, self.model = model_id, model

    def __str__(self) -> str:
        return f"localsteer: {self.model_id}"

    def begin(self, prompt: llm.Prompt) -> SteeredAnswer:
        options = prompt.options
        loading = {name: getattr(options, name) for name in LOADING}
        words, wanted = words_of(options), wanted_of(options, prompt.schema)
        return opened(self.model, **loading).ask(messages_of(prompt), words, wanted)


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
    async def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.AsyncResponse,
        conversation: llm.AsyncConversation | None,
    ) -> AsyncIterator[str]:
        with llms_error():
            answer = await asyncio.to_thread(self.begin, prompt)
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
        raise llm.ModelError(" ".join(str(error).split())) from None


def tell(response: Any, answer: SteeredAnswer) -> None:
    """What `llm logs` keeps: tokens, and what the reply was steered by."""
    response.set_usage(
        input=answer.n_prompt,
        output=answer.n_reply,
        details={"cached_tokens": answer.n_cached} if answer.n_cached else None,
    )
    response.response_json = answer.record()


def messages_of(prompt: llm.Prompt) -> list[dict[str, str]]:
    """The whole conversation, as chat templates read it. Raises LocalsteerError for what is no text."""
    if not hasattr(prompt, "messages"):
        raise LocalsteerError(f"llm {LLM_WANTED} or newer is wanted: pip install -U llm")
    return [{"role": message.role, "content": _text_of(message)} for message in prompt.messages]


def _text_of(message: Any) -> str:
    texts = []
    for part in message.parts:
        kind = type(part).__name__
        if kind == "TextPart":
            texts.append(part.text)
        elif kind != "ReasoningPart":  # which templates leave out of earlier turns
            raise LocalsteerError(
                f"localsteer reads texts, and this conversation has a {kind}: begin another."
            )
    return "".join(texts)


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
        raise click.ClickException(" ".join(str(error).split())) from None


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
    if any(map(str.isspace, model_id)) or model_id == PREFIX:
        raise LocalsteerError(f"{model_id!r} has a blank in it, or nothing: choose a --name without one.")
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
    from localsteer.cache import atomic_path

    with atomic_path(models_file()) as temporary:
        temporary.write_text(json.dumps(models, indent=2) + "\n", "utf-8")
