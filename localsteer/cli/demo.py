"""`localsteer demo`: what steering does to a real model, or every step of it on the bundled one."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from localsteer.errors import LocalsteerError

from . import options
from .console import answer, note, print_json, progress, shown, table
from .models import catalog_of, extraction_queries, find_instruction, is_bundled, model_file, open_engine

if TYPE_CHECKING:
    from rich.table import Table

    from localsteer.catalog import Catalog
    from localsteer.demo import DemoDocument
    from localsteer.packs import Entry
    from localsteer.vector import ControlVector

    from .options import Params

REAL = "smol"  # the demo's model, if its package is installed
N_SHOWN = 4  # of its instructions
DEFAULT_INSTRUCTIONS = ("title", "one_sentence", "bullets", "sections")  # of a model without figures
SHARES = ("none", "steered", "random", "other", "instructed", "both")
N_SEQ_MAX = 16  # replies that are decoded together
SHOWN_FIRST = ("json", "lowercase", "one_sentence", "bullets", "spanish")  # of the examples
N_EXAMPLES = 3


@click.command("demo", short_help="Watch a small quantized model being steered, with controls.")
@click.argument("question", required=False)
@click.option(
    "-m",
    "--model",
    metavar="GGUF",
    help="A GGUF file, or a name. [default: smol if it is installed, else bundled]",
)
@click.option(
    "-i",
    "--instructions",
    metavar="ID,ID",
    help="Instructions to show. [default: the four that gain most from steering; all for the bundled model]",
)
@click.option(
    "-n",
    type=click.IntRange(min=1),
    metavar="N",
    help="Test questions for each instruction. [default: 5; bundled 20]",
)
@click.option(
    "--quant", metavar="TYPE", help="Quantization of the bundled model: Q4_K_M, F16, ... [default: Q8_0]"
)
@click.option(
    "--backend",
    type=click.Choice(("gguf", "torch")),
    help="Where the bundled model's vectors are extracted: in the quantized model, or in PyTorch. "
    "[default: gguf]",
)
@click.option(
    "-o", "--out", type=click.Path(), metavar="DIR", help="Where vector files go. [default: the cache]"
)
@options.threads
@options.as_json
def command(
    question: str | None,
    model: str | None,
    instructions: str | None,
    n: int | None,
    as_json: bool,
    threads: int | None,
    **bundled: Any,
) -> None:
    """Steer a small quantized model: a table of the conditions on test questions, and replies side by side.
    With your own QUESTION: the plain reply to it, and a steered one for each instruction.

    The model is SmolLM2-135M-Instruct if the extra `smol` is installed, with the vectors that ship for it.
    Otherwise it is the one that comes with localsteer, which is quantized, extracted from and tuned as you
    watch.

    \b
    Columns: how many replies follow the instruction
      none      the plain prompt                   told    the instruction in the prompt
      steered   the plain prompt and the vector    both    told and steered
      random    a random direction instead         other   another instruction's vector
      kept      steered replies that still name what was asked about
      ppl       perplexity of the replies under the unsteered model, plain and steered
      settings  strength@layer and positions

    \b
    Examples:
      localsteer demo
      localsteer demo "How do bees find home?"
      localsteer demo -m bundled --quant Q4_K_M --instructions json,lowercase,one_sentence
      localsteer demo -m MODEL.gguf --instructions title,json
    """
    ids = None if instructions is None else [name.strip() for name in instructions.split(",") if name.strip()]
    chosen = model or _default_model()
    asked = Demonstration(chosen, question, ids, n, threads, bundled)
    document = _bundled_demo(asked) if is_bundled(chosen) else _real_demo(asked)
    if as_json:
        print_json(document)
        return
    console = answer()
    if document.get("instructions"):
        console.print(results(document))
        console.print()
    console.print(examples(document["examples"], everything=question is not None))
    console.print()
    console.print(what_next(document, chosen), soft_wrap=True)


def _default_model() -> str:
    from localsteer.model_names import not_installed, packaged_file

    if packaged_file(REAL) is not None:
        return REAL
    note(f"this is the small model that comes with localsteer. To see a real one: {not_installed(REAL)}.")
    return "bundled"


@dataclass(frozen=True)
class Demonstration:
    """What to show. ids: of instructions. n: test questions for each. bundled: options that only the bundled
    model takes."""

    model: str
    question: str | None
    ids: list[str] | None
    n: int | None
    threads: int | None
    bundled: Params


def _bundled_demo(asked: Demonstration) -> DemoDocument:
    from localsteer.demo import DEFAULT_N, run_demo

    if asked.question is not None:
        raise click.UsageError(
            "a question of your own needs a real model: name one with -m MODEL.gguf, or install `smol`."
        )
    if asked.model != "bundled":
        raise click.UsageError(f"the quantization of {asked.model} is chosen with --quant: use -m bundled.")
    return run_demo(
        quant=asked.bundled["quant"] or "Q8_0",
        backend=asked.bundled["backend"] or "gguf",
        instructions=asked.ids,
        n=asked.n or DEFAULT_N,
        out=asked.bundled["out"],
        n_threads=asked.threads,
        stage=progress,
    )


def _real_demo(asked: Demonstration) -> DemoDocument:
    from localsteer.demo import N_REAL, answers, demonstrate

    for name, value in asked.bundled.items():
        if value is not None:
            raise click.UsageError(f"--{name} is for the bundled model: leave it out, or use -m bundled.")
    catalog = catalog_of(asked.model, None)
    vectors = _vectors(asked.model, asked.ids, catalog, asked.threads)
    with open_engine(asked.model, threads=asked.threads, n_seq_max=N_SEQ_MAX) as engine:
        if asked.question is not None:
            return {"model": asked.model, "examples": answers(engine, catalog, vectors, asked.question)}
        document = demonstrate(engine, catalog, vectors, n=asked.n or N_REAL, stage=progress)
    return document | {"model": _published_name(asked.model) or document["model"]}


def _published_name(model: str) -> str | None:
    """The publisher's name for the model, if known; the name in a file may be that of a training run."""
    from localsteer.packs import pack_for

    match = pack_for(model_file(model))
    return match.pack.model if match else None


def _best_known(model: str) -> list[str]:
    """The instructions that gain most from steering, over plain and told replies, by the figures that ship
    for the model."""
    from localsteer.catalog import load_catalog
    from localsteer.packs import pack_for

    match = pack_for(model_file(model))
    helpful = [entry for entry in match.pack.instructions.values() if entry.helps] if match else []
    helpful.sort(key=_gain, reverse=True)
    known = load_catalog().instructions
    # two with the same verifier would show the same thing twice
    best = {known[entry.id].verifier: entry.id for entry in reversed(helpful) if entry.id in known}
    ordered = [entry.id for entry in helpful if entry.id in best.values()]
    return ordered[:N_SHOWN] or list(DEFAULT_INSTRUCTIONS)


def _gain(entry: Entry) -> float:
    without = max(entry.scores[name] or 0.0 for name in ("none", "instructed"))
    return entry.scores["steered"] - without


def _vectors(
    model: str, ids: list[str] | None, catalog: Catalog, threads: int | None
) -> dict[str, ControlVector]:
    """Vectors that ship for the model or were made before, else made now; without those that do nothing."""
    from .first_use import vector_on_first_use

    vectors = {}
    for name in ids or _best_known(model):
        instruction = find_instruction(catalog, name, ())
        queries = extraction_queries(catalog, instruction, None)
        vector = vector_on_first_use(model, instruction, catalog, queries, threads=threads)
        if vector.strength:
            vectors[name] = vector
    if not vectors:
        raise LocalsteerError(
            f"none of these instructions can be steered on {model}: name others with --instructions."
        )
    return vectors


def results(document: DemoDocument) -> Table:
    """A line for each instruction, and their mean."""
    numbers = ("none", "steered", "random", "other", "told", "both", "kept", "ppl")
    title = f"{document['model']} {document['quant']}, {document['seconds']:.0f} s"
    # with one-blank gaps it fits into a terminal of 80 columns
    rows = table("instruction", *numbers, "settings", numbers=numbers, title=title, gap=1)
    rows.columns[-1].no_wrap = True
    for row in document["instructions"]:
        rows.add_row(row["id"], *_figures(row), _settings(row))
    rows.add_section()
    rows.add_row("mean", *_figures(document["mean"]), "", style="bold")
    return rows


def _settings(row: Mapping[str, Any]) -> str:
    """`1@4 prompt`: strength and layer as `-s FILE:1@4` takes them."""
    return "-" if row["layer"] is None else f"{row['strength']:g}@{row['layer']} {row['positions']}"


def _figures(row: Mapping[str, Any]) -> list[str]:
    shares = [_percent(row[name]) for name in (*SHARES, "subject_kept")]
    before, after = row["quality_none"], row["quality_steered"]
    return [*shares, "-" if before is None or after is None else f"{before:.1f}→{after:.1f}"]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


def examples(found: Sequence[Mapping[str, str]], everything: bool = False) -> Table:
    """A table of replies, plain and steered side by side: a few, or all."""
    order = sorted(found, key=lambda each: each["id"] not in SHOWN_FIRST)
    rows = table("question", "plain", "steered")
    for example in order if everything else order[:N_EXAMPLES]:
        question = f"{example['query']}\n({example['id']})"
        rows.add_row(question, shown(example["none"]), shown(example["steered"]), end_section=True)
    return rows


def what_next(document: DemoDocument, model: str) -> str:
    """What to type after the demo."""
    first = document["examples"][0]["id"]
    lines = [f'localsteer run -m {model} --instruction {first} --compare "Tell me about foxes."']
    files = [row["file"] for row in document.get("instructions", ()) if "file" in row]
    if files:
        lines.insert(0, f'localsteer run -s {shlex.quote(files[0])} "Tell me about foxes."')
    else:
        lines.insert(0, 'localsteer demo "How do bees find home?"')
    lines += [
        f'localsteer run -m MODEL.gguf --instruction {first} --compare "Tell me about foxes."',
        'localsteer tune -m MODEL.gguf --instruction "Answer in rhyme." -o rhyme.gguf',
    ]
    return "\n".join(["Steer this model yourself, then your own:", *(f"  {line}" for line in lines)])
