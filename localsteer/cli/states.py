"""`localsteer states`: writes residual states of many prompts into a safetensors file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localsteer.jsonable import JsonObject
from localsteer.token_choice import FORMS

from . import options
from .console import note, print_json, progress, shown
from .extract import check_folder
from .models import load_engine, set_variables
from .vector_spec import VectorSpec

if TYPE_CHECKING:
    from localsteer.states.writing import WrittenStates

DTYPES = ("float32", "float16")  # as localsteer.states.file has them


@click.command("states", short_help="Write the residual states of many prompts to a file.")
@options.model
@click.option(
    "--prompts",
    required=True,
    type=click.Path(),
    metavar="FILE",
    help='One prompt per line, or JSONL of {"prompt": TEXT} or {"messages": [...]}, optionally with "reply".',
)
@click.option(
    "-o", "--output", type=click.Path(), default="states.safetensors", metavar="FILE",
    help="[default: states.safetensors]",
)  # fmt: skip
@click.option(
    "--layer", type=options.Layers(), metavar="LAYERS", help="Layers: 12, 3,4 or 3-5. [default: all]"
)
@click.option(
    "--tokens", default="last", metavar="WHICH", help=f"{FORMS[0].upper()}{FORMS[1:]}. [default: last]"
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="float32",
    show_default=True,
    help="Number type of the states.",
)
@click.option("--raw", is_flag=True, help="Read the prompts as they are, without the chat template.")
@click.option(
    "-s",
    "--steer",
    "specs",
    multiple=True,
    metavar="VECTOR",
    help="Steer while reading: FILE[:STRENGTH][@LAYER[,LAYER]]; repeat for several.",
)
@options.template_variables
@click.option("--exact", is_flag=True, help="F32 cache, no flash attention; slower.")
@options.engine
@options.as_json
def command(
    model: str,
    prompts: str,
    output: str,
    tokens: str,
    specs: tuple[str, ...],
    variables: JsonObject | None,
    as_json: bool,
    **params: Any,
) -> None:
    """Write the residual stream of MODEL after the chosen layers, at the chosen tokens of every prompt.

    A state is the one after the layer, hidden_states[layer + 1] in transformers. The file gets its full
    length at the start, and memory use does not grow with it. It loads with safetensors.torch or .numpy, or
    as a memory map. The same command continues a run that was stopped. docs/states.md describes the file.

    \b
    Examples:
      localsteer states -m MODEL.gguf --prompts prompts.txt -o states.safetensors
      localsteer states -m MODEL.gguf --prompts chats.jsonl --layer 8-16 --tokens all --dtype float16
      localsteer states -m MODEL.gguf --prompts facts.txt --raw --tokens "last:the Eiffel Tower"
      localsteer states -m MODEL.gguf --prompts prompts.txt -s json.gguf:0.8@12 -o steered.safetensors
    """
    from localsteer.prompt_texts import read_prompts
    from localsteer.states import write_states
    from localsteer.states.file import check_target
    from localsteer.token_choice import TokenChoice

    path, choice = Path(output), TokenChoice.parse(tokens)
    check_target(path)
    check_folder(path)
    texts = read_prompts(prompts, raw=params["raw"])
    vectors = [VectorSpec.parse(spec).load() for spec in specs]
    loading = {name: params[name] for name in ("ctx_size", "threads", "gpu_layers", "exact")}
    with load_engine(model, **loading) as engine, progress("reading states") as on_progress, _going_on(path):
        set_variables(engine, variables)
        done = write_states(
            engine,
            texts,
            path,
            layer=params["layer"],
            tokens=choice,
            dtype=params["dtype"],
            steer=vectors,
            on_progress=on_progress,
        )
    if as_json:
        print_json({"file": str(path), **done})
    else:
        click.echo(shown(str(path)))
        note(_summary(done))


@contextmanager
def _going_on(path: Path) -> Iterator[None]:
    """After Ctrl-C, says how to continue the run, if any of it is done."""
    from localsteer.states.file import beside

    try:
        yield
    except KeyboardInterrupt:
        if beside(path)[0].exists():
            note("what is done is kept: the same command continues from there.")
        raise


def _summary(done: WrittenStates) -> str:
    shape = f"{done['rows']} x {len(done['layers'])} layers x {done['n_embd']}, {done['dtype']}"
    prompts = f"{done['prompts']} prompt{'s' * (done['prompts'] != 1)}"
    kept = f" ({done['kept']} of them from an earlier run)" if done["kept"] else ""
    return f"{prompts}{kept}; {shape}, {done['bytes'] / 1000:,.0f} kB."
