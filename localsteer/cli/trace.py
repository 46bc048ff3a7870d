"""`localsteer trace`: what steering does to every token of a prompt and its reply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from localsteer.cache import require_folder

from . import options
from .console import answer, note, print_json, progress
from .models import open_engine
from .options import Params
from .prompt_input import read_prompt


class Watched(options.Layers):
    """Layers, or `all`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "all" else super().convert(value, param, ctx)


@click.command("trace", short_help="Show what steering does, token by token.")
@click.argument("prompt", required=False)
@options.model
@options.vectors
@options.settings
@click.option(
    "--watch",
    "layers",
    cls=options.Renamed,
    old=["--blocks"],
    type=Watched(),
    metavar="LAYERS",
    help="Also show these layers, steered or not, and what steering there would do: 3, 2-5 or `all`.",
)
@click.option("--reply", metavar="TEXT", help="Trace this reply instead of one by the steered model.")
@options.ridge
@click.option("--system", "-sys", metavar="TEXT", help="A system message before the prompt.")
@options.raw
@options.reply_length(64)
@click.option("--temp", type=float, default=0.0, metavar="X", help="Temperature; 0 is greedy. [default: 0]")
@click.option("--seed", type=int, metavar="N", help="[default: another one each time]")
@options.engine
@options.instruction_data
@click.option("--plot", type=click.Path(), metavar="PNG", help="Also draw it into a picture.")
@click.option(
    "--html", type=click.Path(), metavar="HTML", help="Also write it as a page: one file, no network needed."
)
@options.as_json
def command(
    prompt: str | None,
    model: str,
    specs: tuple[str, ...],
    instructions: tuple[str, ...],
    as_json: bool,
    **params: Any,
) -> None:
    """Answer PROMPT with steering, and show for each token of prompt and reply the projection on the vector's
    direction before and after the edit, its target and the dynamic weight.

    Below them come the effect, that is, how much steering changes what the model says there, in nats, and the
    token that the plain model would say instead. The last lines say what this means: for instance a wrong
    layer, a reply locked at its start, or a vector that does nothing.

    \b
    Examples:
      localsteer trace --instruction json "Tell me about foxes."
      localsteer trace -m MODEL.gguf -s json.gguf "Tell me about foxes."
      localsteer trace -m MODEL.gguf -s json.gguf@12 --watch all --plot trace.png "Tell me about foxes."
      localsteer trace -m MODEL.gguf -s json.gguf --reply "A fox is red." --html trace.html "What is a fox?"
    """
    from localsteer.runtime.sampling import Sampling
    from localsteer.trace import trace

    from .run import load_vectors, message_of, vector_of

    _check_options(specs, instructions, params)
    sampling = Sampling(temp=params["temp"], seed=params["seed"])
    vectors = load_vectors(specs, params)
    message = message_of(read_prompt(prompt), params["system"], params["raw"])
    loading = {name: params[name] for name in ("ctx_size", "threads", "gpu_layers")}
    vectors += [vector_of(model, text, params, loading) for text in instructions]
    with (
        open_engine(model, **loading, as_asked=True, n_seq_max=1) as engine,
        progress("tracing") as on_progress,
    ):
        traced = trace(
            engine,
            message,
            vectors,
            max_tokens=None if params["predict"] < 0 else params["predict"],
            sampling=sampling,
            reply=params["reply"],
            layers=params["layers"],
            ridge=params["ridge"],
            raw=params["raw"],
            on_progress=on_progress,
        )
    _write_pictures(traced, params["plot"], params["html"])
    if as_json:
        print_json({"prompt": message, **traced.to_dict()})
        return
    from localsteer.trace.terminal import print_trace

    print_trace(traced, answer())


def _check_options(specs: tuple[str, ...], instructions: tuple[str, ...], params: Params) -> None:
    """Raise LocalsteerError before the work if its result could not be written."""
    plot, html = params["plot"], params["html"]
    if not (specs or instructions):
        raise click.UsageError("there is nothing to trace: add -s VECTOR or --instruction.")
    if html is not None and Path(html).suffix.lower() not in (".html", ".htm"):
        raise click.BadParameter(f"{html!r} does not end in .html: name a page.", param_hint="--html")
    for path in filter(None, (plot, html)):
        require_folder(path)


def _write_pictures(traced: Any, plot: str | None, html: str | None) -> None:
    if plot is not None:
        from localsteer.trace.plot import draw_trace

        draw_trace(traced, plot)
        note(f"drew {plot}")
    if html is not None:
        from localsteer.trace.html import write_page

        write_page(traced, html)
        note(f"wrote {html}")
