"""`localsteer demo`: the whole path on the bundled model, from quantizing to steered replies."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from . import options
from .console import answer, print_json, progress, shown, table

if TYPE_CHECKING:
    from rich.table import Table

SHARES = ("none", "steered", "random", "other", "instructed", "both")
SHOWN_FIRST = ("json", "lowercase", "one_sentence", "bullets", "spanish")  # of the examples
N_EXAMPLES = 3


@click.command("demo", short_help="Watch a small quantized model being steered, with controls.")
@click.option(
    "--quant",
    default="Q8_0",
    show_default=True,
    metavar="TYPE",
    help="Quantization of the bundled model, as llama.cpp names it: Q4_K_M, F16, ...",
)
@click.option(
    "--backend",
    type=click.Choice(("gguf", "torch")),
    default="gguf",
    show_default=True,
    help="Where vectors are extracted: in the quantized model, or in PyTorch.",
)
@click.option(
    "-i",
    "--instructions",
    metavar="ID,ID",
    help="Of the bundled catalogue. [default: all formats and lengths]",
)
@click.option(
    "-n", default=20, show_default=True, type=click.IntRange(min=1), metavar="N", help="Test questions each."
)
@click.option(
    "-o", "--out", type=click.Path(), metavar="DIR", help="Where vector files go. [default: the cache]"
)
@click.option("-t", "--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads.")
@options.as_json
def command(
    quant: str,
    backend: str,
    instructions: str | None,
    n: int,
    out: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Steer the model that comes with localsteer: quantize it, extract a vector for each instruction, pick
    settings on validation questions, and compare the conditions on test questions, about subjects that
    neither training nor extraction nor picking has seen.

    \b
    Columns: how many replies follow the instruction
      none      the model alone, asked plainly     told    the instruction stands in the prompt
      steered   the vector, not a word of it       both    told and steered
      random    a random direction in its place    other   another instruction's vector in its place
      kept      steered replies that still name what was asked about
      ppl       perplexity of the replies to the unsteered model, plain and steered
      settings  strength@block and positions that were picked

    \b
    Examples:
      localsteer demo
      localsteer demo --quant Q4_K_M --instructions json,lowercase,one_sentence
      localsteer demo --json > demo.json
    """
    from localsteer.demo import run_demo

    ids = None if instructions is None else [each.strip() for each in instructions.split(",") if each.strip()]
    document = run_demo(
        quant=quant, backend=backend, instructions=ids, n=n, out=out, n_threads=threads, stage=progress
    )
    if as_json:
        print_json(document)
        return
    console = answer()
    console.print(results(document))
    console.print()
    console.print(examples(document["examples"]))
    console.print()
    console.print(what_next(document), soft_wrap=True)


def results(document: Mapping[str, Any]) -> Table:
    """A line for each instruction, and their mean."""
    numbers = ("none", "steered", "random", "other", "told", "both", "kept", "ppl")
    title = f"{document['model']} {document['quant']}, {document['seconds']:.0f} s"
    # with gaps of one blank it fits a terminal of 80 columns
    made = table("instruction", *numbers, "settings", numbers=numbers, title=title, gap=1)
    made.columns[-1].no_wrap = True
    for row in document["instructions"]:
        made.add_row(row["id"], *_figures(row), _settings(row))
    made.add_section()
    made.add_row("mean", *_figures(document["mean"]), "", style="bold")
    return made


def _settings(row: Mapping[str, Any]) -> str:
    """`1@4 prompt`: strength and block as `-s FILE:1@4` takes them."""
    return "-" if row["layer"] is None else f"{row['strength']:g}@{row['layer']} {row['positions']}"


def _figures(row: Mapping[str, Any]) -> list[str]:
    shares = [_percent(row[name]) for name in (*SHARES, "subject_kept")]
    before, after = row["quality_none"], row["quality_steered"]
    return [*shares, "-" if before is None or after is None else f"{before:.1f}→{after:.1f}"]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


def examples(found: Sequence[Mapping[str, str]]) -> Table:
    """A few replies, plain and steered side by side."""
    order = sorted(found, key=lambda each: each["id"] not in SHOWN_FIRST)
    made = table("question", "plain", "steered")
    for example in order[:N_EXAMPLES]:
        question = f"{example['query']}\n({example['id']})"
        made.add_row(question, shown(example["none"]), shown(example["steered"]), end_section=True)
    return made


def what_next(document: Mapping[str, Any]) -> str:
    """What to type after the demo."""
    first = document["instructions"][0]
    return f"""\
Steer this model yourself, then your own:
  localsteer run -s {shlex.quote(first["file"])} "Tell me about foxes."
  localsteer run --instruction {first["id"]} --compare "Tell me about foxes."
  localsteer run -m MODEL.gguf --instruction json --compare "Tell me about foxes."
  localsteer extract --gguf MODEL.gguf --instruction "Answer in rhyme." -o rhyme.gguf"""
