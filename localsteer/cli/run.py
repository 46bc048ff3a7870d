"""`localsteer run`: one prompt, one reply, steered."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import click

from . import options
from .considered import harmless
from .console import answer, note, print_json, shown, table
from .models import (
    catalog_of,
    extraction_queries,
    find_instruction,
    open_engine,
    own_sampling,
    read_text,
    set_variables,
)
from .options import Params
from .prompt_input import read_prompt
from .vector_spec import VectorSpec, with_own_strength

if TYPE_CHECKING:
    from localsteer.constrain import Constraint
    from localsteer.engine import Engine
    from localsteer.ensure import Ensured, EnsuredRecord
    from localsteer.plan import Plan
    from localsteer.runtime.ask import Ask, Prompt
    from localsteer.runtime.reply import Chunk, Reply
    from localsteer.runtime.sampling import Sampling
    from localsteer.vector import ControlVector, VectorSettings

SETTINGS = ("layer", "mode", "positions", "strength")
INSTRUCTION_DATA = ("catalog", "slots", "queries", "pairs")
TRIES = 3


@click.command("run", short_help="Answer a prompt with steering, and stream the reply.")
@click.argument("prompt", required=False)
@options.model
@options.vectors
@click.option(
    "--ensure",
    "ensured",
    multiple=True,
    metavar="ID_OR_FILE",
    help="Steer by this only if the plain reply fails its verifier: an instruction of the "
    "catalogue, or a vector file.",
)
@click.option(
    "--tries",
    type=click.IntRange(min=1),
    metavar="N",
    help="At most this many replies with --ensure, including the plain one. [default: 3]",
)
@click.option(
    "--stream/--no-stream",
    default=True,
    help="Show the reply as it is generated, or once it is complete; with --ensure only the accepted one.",
)
@click.option("--compare", is_flag=True, help="Show the plain and the steered reply side by side.")
@options.settings
@options.always_steer
@options.ridge
@options.steer_forms
@click.option("--system", "-sys", metavar="TEXT", help="A system message before the prompt.")
@options.raw
@options.reply_length(512)
@options.stop()
@options.sampling
@options.template_variables
@options.engine
@options.rpc
@options.instruction_data
@click.option("--timings", is_flag=True, help="Tokens per second, on stderr.")
@options.as_json
def command(
    prompt: str | None,
    model: str,
    specs: tuple[str, ...],
    instructions: tuple[str, ...],
    ensured: tuple[str, ...],
    as_json: bool,
    **params: Any,
) -> None:
    """Answer PROMPT and stream the reply.

    --layer, --mode, --positions and --strength override the vectors' settings; a strength or layer after the
    name of a vector file overrides both. A reply under a schema or a grammar stays plain: only its prompt is
    steered. The prompt can come from a pipe; if there is also an argument, the piped text comes first.

    \b
    Examples:
      localsteer run --instruction json "Tell me about foxes."
      localsteer run -m MODEL.gguf -s json.gguf "Tell me about foxes."
      localsteer run -m MODEL.gguf -s json.gguf:0.8@12 -s lower.gguf --temp 0 "Tell me about foxes."
      localsteer run -m MODEL.gguf -s json.gguf --compare "Tell me about foxes."
      localsteer run --ensure json "Tell me about foxes."
      cat notes.txt | localsteer run -m MODEL.gguf -i "Answer in rhyme." "Sum this up."
    """
    from localsteer.runtime.ask import Ask

    _check_options(specs, instructions, ensured, params)
    sampling = sampling_of(own_sampling(model, params))
    plain_forms = stays_plain(sampling, params["steer_forms"])
    vectors = load_vectors(specs, params)
    insisted = with_own_strength(specs, vectors)
    # whoever compares, or sets a strength, wants to see what the vectors do
    literal = params["always_steer"] or params["compare"] or params["strength"] is not None
    message = message_of(read_prompt(prompt), params["system"], params["raw"])
    loading = {name: params[name] for name in options.LOADING}
    vectors += [vector_of(model, text, params, loading) for text in instructions]
    checked = [vector_to_ensure(model, text, params, loading) for text in ensured]
    with open_engine(model, **loading, as_asked=True, n_seq_max=1) as engine:
        set_variables(engine, params["variables"])
        always = vectors if literal else insisted
        vectors, left_out = harmless(engine, vectors, message, always=always, raw=params["raw"])
        ask = Ask(
            message,
            steer=plan_of(engine, vectors, params["ridge"]),
            max_tokens=None if params["predict"] < 0 else params["predict"],
            sampling=sampling,
            stop=params["stop"],
            raw=params["raw"],
            plain_forms=plain_forms,
        )
        if plain_forms:
            tell_of_forms([*vectors, *checked])
        request = Question(engine, ask)
        if as_json:
            print_json(_answer(request, model, vectors, checked, params) | left_out)
        elif checked:
            show_ensured(request, ensure_reply(request, vectors, checked, params), params["timings"])
        elif params["compare"]:
            show_both(request, vectors, params["timings"])
        else:
            show_reply(request, params["timings"], params["stream"])


def _check_options(
    specs: tuple[str, ...], instructions: tuple[str, ...], ensured: tuple[str, ...], params: Params
) -> None:
    """Raise click.UsageError for options that exclude each other, or would do nothing."""
    if params["compare"] and ensured:
        raise click.UsageError(
            "--ensure chooses between the plain and the steered reply: leave out --compare."
        )
    if params["compare"] and not (specs or instructions):
        raise click.UsageError("--compare needs something to steer by: add -s VECTOR or --instruction.")
    something = "something to steer by: add -s VECTOR or --instruction"
    stated = params | {"ridge": params["ridge"] or None}
    stated |= {name: params[name.replace("-", "_")] or None for name in ("always-steer", "steer-forms")}
    _refuse_idle(stated, something, specs + instructions + ensured)
    _refuse_idle(stated, "--instruction or --ensure ID", instructions + ensured, INSTRUCTION_DATA)
    _refuse_idle(stated, "--ensure", ensured, ("tries",))
    _refuse_idle(stated, something, specs + instructions, ("always-steer",))
    _refuse_idle(stated, something, specs + instructions + ensured, ("steer-forms",))
    if params["raw"] and params["variables"]:
        raise click.UsageError("--chat-template-kwargs needs the chat template: leave out --raw.")


def _refuse_idle(
    params: Params, need: str, there: tuple[str, ...], names: Sequence[str] = (*SETTINGS, "ridge")
) -> None:
    """Raise click.UsageError for an option that would do nothing because what it needs is not `there`."""
    for name in () if there else names:
        if params[name] not in (None, ()):
            raise click.UsageError(f"--{name.removesuffix('s') if name == 'slots' else name} needs {need}.")


@dataclass(frozen=True)
class Question:
    """The question, its steering, and the engine that answers it."""

    engine: Engine
    ask: Ask

    def stream(self, *, steered: bool = True) -> Iterator[Chunk]:
        return self.engine.stream(self.ask if steered else self.plain)

    def reply(self, *, steered: bool = True) -> Reply:
        return self.engine.generate(self.ask if steered else self.plain)

    @property
    def plain(self) -> Ask:
        return replace(self.ask, steer=())


def sampling_of(params: Params) -> Sampling:
    """Sampling from the options; the seed is drawn here so that two replies can share it."""
    from localsteer.runtime.sampling import Sampling

    names = ("temp", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n", "presence_penalty")
    return Sampling(
        **{name: params[name] for name in names},
        frequency_penalty=params["frequency_penalty"],
        seed=random.randrange(2**32 - 1) if params["seed"] in (None, -1) else params["seed"],
        grammar=grammar_of(params),
    )


def stays_plain(sampling: Sampling, steer_forms: bool) -> bool:
    """Whether to leave the whole reply unsteered because a form is forced on it (docs/clients.md)."""
    if steer_forms and sampling.grammar is None:
        raise click.UsageError("--steer-forms needs --json-schema or --grammar: any other reply is steered.")
    return sampling.grammar is not None and not steer_forms


def tell_of_forms(vectors: Sequence[ControlVector]) -> None:
    """Explain to the user why steering has less effect under a schema than without one."""
    if any(vector.positions != "prompt" for vector in vectors):
        note(
            "a reply under a schema or a grammar stays plain: only its prompt is steered "
            "(--steer-forms steers both)."
        )


def grammar_of(params: Params) -> Constraint | str | None:
    """The constraint from --grammar, --grammar-file or --json-schema, or None."""
    from localsteer.constrain import Constraint

    there = [name for name in ("grammar", "grammar_file", "json_schema") if params[name] is not None]
    if len(there) > 1:
        first, second = (f"--{name.replace('_', '-')}" for name in there[:2])
        raise click.UsageError(f"{first} and {second} exclude each other.")
    if params["grammar_file"] is not None:
        return read_text(params["grammar_file"], "the grammar file")
    schema = params["json_schema"]
    if schema is None:
        return params["grammar"]
    is_text = schema.lstrip().startswith("{") or schema.strip() in ("true", "false")
    return Constraint.json_schema(schema if is_text else read_text(schema, "the JSON schema"))


def load_vectors(specs: Sequence[str], params: Params) -> list[ControlVector]:
    """The vector files, loaded before the model: a mistyped name should not wait for it."""
    settings = {name: params[name] for name in SETTINGS}
    return [VectorSpec.parse(spec).load(**settings) for spec in specs]


def message_of(text: str, system: str | None, raw: bool) -> Prompt:
    if system is None:
        return text
    if raw:
        raise click.UsageError("--system needs the chat template, which --raw leaves out: choose one.")
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def vector_of(model: str, text: str, params: Params, loading: Params) -> ControlVector:
    """The vector of an instruction, made on first use."""
    from .first_use import vector_on_first_use

    catalog = catalog_of(model, params["catalog"])
    instruction = find_instruction(catalog, text, params["slots"])
    queries = extraction_queries(catalog, instruction, params["queries"])
    vector = vector_on_first_use(
        model, instruction, catalog, queries, params["pairs"], search=params["layer"] is None, **loading
    )
    return vector.at(**{name: params[name] for name in SETTINGS})


def vector_to_ensure(model: str, text: str, params: Params, loading: Params) -> ControlVector:
    """A vector file, or an instruction's vector, made on first use; `json:0.8@3` overrides its settings."""
    spec = VectorSpec.parse(text)
    if os.path.exists(spec.path) or Path(spec.path).suffix == ".gguf":
        return spec.load(**{name: params[name] for name in SETTINGS})
    catalog = catalog_of(model, params["catalog"])
    if find_instruction(catalog, spec.path, params["slots"]).verifier is None:
        raise click.UsageError(
            f"{spec.path!r} has no verifier, so nothing tells whether a reply follows it: steer by it with "
            "--instruction."
        )
    if spec.layers is not None:  # as with --layer: no layer is searched for
        params = {**params, "layer": spec.layers}
    return vector_of(model, spec.path, params, loading).at(strength=spec.strength)


def ensure_reply(
    request: Question,
    vectors: Sequence[ControlVector],
    checked: Sequence[ControlVector],
    params: Params,
) -> Ensured:
    from localsteer.ensure import ensure

    ask = replace(request.ask, steer=vectors)
    return ensure(request.engine, ask, checked, tries=params["tries"] or TRIES, ridge=params["ridge"])


def steered_by(found: Ensured, checked: Sequence[ControlVector]) -> list[ControlVector]:
    """The vectors at the strengths with which the accepted reply was steered; none for a plain reply."""
    chosen = next(attempt for attempt in found.tries if attempt.reply is found.reply)
    return [vector.at(strength=s) for vector, s in zip(checked, chosen.strengths, strict=False)]


def show_ensured(request: Question, found: Ensured, timings: bool) -> None:
    """Print the accepted reply, and on stderr how it was found."""
    text = found.reply.text
    click.echo(shown(text), nl=not text.endswith("\n"))
    if found.notice:
        note(found.notice)
    elif found.steered_strength:
        failed = ", ".join(found.tries[0].failed) or "itself"
        note(f"the plain reply fails {failed}: this one is steered at strength {found.steered_strength:g}.")
    if found.reply.finish_reason == "length":
        note(_why_cut(request, len(found.reply.tokens)))
    if timings:
        note(f"{len(found.tries)} replies of {found.n_tokens} tokens together")


def plan_of(engine: Engine, vectors: Sequence[ControlVector], ridge: float) -> Plan:
    from localsteer.plan import Plan

    for vector in vectors:
        # checks that the vectors belong to this model, which a finished plan no longer shows
        engine.plan(vector)
    return Plan.from_vectors(vectors, ridge=ridge)


def show_reply(request: Question, timings: bool, stream: bool = True) -> None:
    """Print text as it comes, and a newline after it however it ends; nothing for an empty reply."""
    text, held = "\n", ""
    try:
        for chunk in request.stream():
            held += chunk.text
            if held and (stream or chunk.finish_reason):
                text, held = held, ""
                sys.stdout.write(shown(text))
                sys.stdout.flush()
    finally:
        if not text.endswith("\n"):
            click.echo()
    _say_how_it_went(request, chunk, timings)


def _say_how_it_went(request: Question, last: Chunk | Reply, timings: bool, whose: str = "") -> None:
    """Tokens per second on stderr. whose: `plain: ` or `steered: ` if there are two replies."""
    spent = last.timings
    if last.finish_reason == "length":
        note(whose + _why_cut(request, spent.reply_tokens))
    if timings:
        note(
            f"{whose}prompt {spent.prompt_tokens} tokens, {spent.prompt_per_second:.1f} per second; "
            f"reply {spent.reply_tokens} tokens, {spent.decode_per_second:.1f} per second"
        )


def _why_cut(request: Question, n: int) -> str:
    if n == request.ask.max_tokens:
        return f"the reply was cut after {n} tokens: raise -n for more."
    return f"the context of {request.engine.n_ctx} tokens is full: the reply was cut after {n} tokens."


def show_both(request: Question, vectors: Sequence[ControlVector], timings: bool) -> None:
    """Print two columns, filled one after the other; only a terminal shows them while they fill."""
    from rich.live import Live

    texts, lasts = ["", ""], []
    titles = ("plain", " + ".join(map(_title, vectors)))

    def columns() -> Any:
        side_by_side = table(*titles)
        for column in side_by_side.columns:
            column.ratio = 1
        side_by_side.expand = True
        side_by_side.add_row(*map(shown, texts))
        return side_by_side

    if answer().is_terminal:
        with Live(console=answer(), transient=True, vertical_overflow="ellipsis") as live:
            for side, steered in enumerate((False, True)):
                for chunk in request.stream(steered=steered):
                    texts[side] += chunk.text
                    live.update(columns())
                lasts.append(chunk)
    else:
        lasts = [request.reply(steered=steered) for steered in (False, True)]
        texts = [reply.text for reply in lasts]
    answer().print(columns())
    for whose, last in zip(("plain: ", "steered: "), lasts, strict=True):
        _say_how_it_went(request, last, timings, whose)


def _title(vector: ControlVector) -> str:
    layers = ",".join(map(str, vector.layers))
    return f"{vector.label}:{vector.strength:g}@{layers} {vector.mode} {vector.positions}"


class ReplyDocument(TypedDict):
    reply: str
    finish_reason: str
    n_tokens: int
    timings: dict[str, float]


class RunDocument(ReplyDocument, total=False):
    """ensure: what was tried, with --ensure. plain: the reply without steering, with --compare."""

    model: str
    prompt: str
    steering: list[VectorSettings]
    seed: int | None
    ensure: EnsuredRecord
    plain: ReplyDocument


def document(request: Question, model: str, vectors: Sequence[ControlVector], reply: Reply) -> RunDocument:
    """Of one reply."""
    from localsteer.vector import settings_of

    return {
        "model": model,
        "prompt": request.ask.prompt,
        "steering": [settings_of(vector) for vector in vectors],
        "seed": request.ask.sampling.seed,
        **_reply_document(reply),
    }


def _answer(
    request: Question,
    model: str,
    vectors: Sequence[ControlVector],
    checked: Sequence[ControlVector],
    params: Params,
) -> RunDocument:
    """The document that `--json` prints, for every kind of question."""
    if checked:
        ensured = ensure_reply(request, vectors, checked, params)
        steering = [*vectors, *steered_by(ensured, checked)]
        return document(request, model, steering, ensured.reply) | {"ensure": ensured.record()}
    steered = document(request, model, vectors, request.reply())
    if not params["compare"]:
        return steered
    return steered | {"plain": _reply_document(request.reply(steered=False))}


def _reply_document(reply: Reply) -> ReplyDocument:
    return {
        "reply": reply.text,
        "finish_reason": reply.finish_reason,
        "n_tokens": len(reply.tokens),
        "timings": asdict(reply.timings),
    }
