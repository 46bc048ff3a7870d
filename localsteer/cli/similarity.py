"""`localsteer similarity`: does an instruction move the state in the same way whatever the query?"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import click

from . import options
from .console import answer, note, print_json, progress, table
from .models import catalog_of, extraction_queries, find_instruction, open_engine

if TYPE_CHECKING:
    from localsteer.catalog import Catalog, Instruction
    from localsteer.evaluate.similarity import LayerSimilarity, Similarity

N_PAIRS = 20
N_INSTRUCTIONS = 12  # if none are named
GROUPS = ("format", "length")


@click.command("similarity", short_help="Check with cosines and probes that an instruction is one direction.")
@click.argument("instructions", nargs=-1, metavar="[INSTRUCTION]...")
@options.model
@click.option(
    "--layer",
    "layer",
    cls=options.Renamed,
    old=["--block"],
    type=click.IntRange(min=0),
    metavar="LAYER",
    help="Layer of the second heat map. [default: the clearest]",
)
@click.option(
    "--plot", type=click.Path(), metavar="PNG", help="Draw both heat maps and the probes into a picture."
)
@click.option(
    "--catalog", metavar="TOML", help="Instructions and queries. [default: the model's, as for extract]"
)
@click.option("--queries", type=click.Path(), metavar="TXT", help="Your own base queries, one per line.")
@click.option(
    "--pairs",
    type=click.IntRange(min=1),
    default=N_PAIRS,
    show_default=True,
    metavar="N",
    help="Prompt pairs for each instruction.",
)
@options.threads
@options.as_json
def command(
    instructions: tuple[str, ...],
    model: str,
    layer: int | None,
    plot: str | None,
    catalog: str | None,
    queries: str | None,
    pairs: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Compare what instructions do to the model's state at the last prompt token, pair by pair and layer by
    layer: the cosine between pair differences of one instruction (high if it is one direction) and of
    different instructions (low if they can be told apart).

    The table also shows how often a probe tells a state with the instruction from one without, on queries and
    wordings that it has not seen: `linear` is a ridge classifier, `gaussian` a kernel that can draw any
    boundary. Without names, the first formats and lengths of the catalogue are compared.

    \b
    Examples:
      localsteer similarity json lowercase one_sentence
      localsteer similarity -m MODEL.gguf --pairs 50 --plot similarity.png
      localsteer similarity -m MODEL.gguf json "Answer in rhyme." --json
    """
    from localsteer.evaluate.similarity import similarity
    from localsteer.extract import build_pairs, open_backend
    from localsteer.extract.states import States

    if plot is not None:
        from localsteer.heatmap import check_picture

        check_picture(plot)
    instructions_catalog = catalog_of(model, catalog)
    chosen = _chosen(instructions_catalog, instructions)
    made = [
        build_pairs(instruction, extraction_queries(instructions_catalog, instruction, queries), pairs)
        for instruction in chosen
    ]
    with open_engine(model, threads=threads) as engine, open_backend(engine) as backend:
        layer = _checked(layer, backend.n_layer)
        with progress("reading states") as on_progress:
            states = States(backend, on_progress)
            states.of([text for group in made for pair in group for text in (pair.plain, pair.instructed)])
        with progress("comparing"):
            done = similarity(states, chosen, made)
        name = backend.model_name
    layer = done.clearest if layer is None else layer
    if plot is not None:
        _draw(done, layer, plot, name)
        note(f"drew {plot}")
    if as_json:
        print_json(_document(done, layer, name))
    else:
        _print(done, layer, name)


def _chosen(catalog: Catalog, names: tuple[str, ...]) -> list[Instruction]:
    if names:
        return [find_instruction(catalog, name, ()) for name in dict.fromkeys(names)]
    usual = [instruction for instruction in catalog.instructions.values() if instruction.group in GROUPS]
    return [
        instruction.fill() for instruction in usual if set(instruction.open_slots) <= set(instruction.slots)
    ][:N_INSTRUCTIONS]


def _checked(layer: int | None, n_layer: int) -> int | None:
    if layer is not None and layer >= n_layer:
        raise click.UsageError(f"--layer {layer} is out of range: the model has layers 0 to {n_layer - 1}.")
    return layer


class InstructionSimilarity(TypedDict):
    """A figure for each layer."""

    id: str
    within: list[float]
    between: list[float]
    linear: list[float]
    gaussian: list[float]


class CosineMatrix(TypedDict):
    layer: int
    cosines: list[list[float]]


class SimilarityDocument(TypedDict):
    model: str
    n_pairs: int
    layers: list[LayerSimilarity]
    instructions: list[InstructionSimilarity]
    matrix: CosineMatrix


def _document(done: Similarity, layer: int, name: str) -> SimilarityDocument:
    return {
        "model": name,
        "n_pairs": done.n_pairs,
        "layers": done.rows(),
        "instructions": [
            {
                "id": name,
                "within": done.within[k].tolist(),
                "between": done.between[k].tolist(),
                "linear": done.linear[k].tolist(),
                "gaussian": done.gaussian[k].tolist(),
            }
            for k, name in enumerate(done.instructions)
        ],
        "matrix": {"layer": layer, "cosines": done.matrix[layer].tolist()},
    }


def _print(done: Similarity, layer: int, name: str) -> None:
    from localsteer.heatmap import terminal_heatmap

    console = answer()
    title = f"{name}: cosine between pair differences within an instruction, by layer"
    layers = range(done.n_layer)
    console.print(terminal_heatmap(title, done.instructions, layers, done.within.tolist(), low=0, high=1))
    console.print()
    title = f"layer {layer}: within (diagonal) and between instructions, in the same order"
    columns = [instruction[:6] for instruction in done.instructions]
    values = done.matrix[layer].tolist()
    console.print(terminal_heatmap(title, done.instructions, columns, values, low=0, high=1))
    console.print()
    numbers = ("layer", "within", "between", "linear probe", "gaussian probe")
    rows = table(*numbers, numbers=numbers)
    for row in done.rows():
        between = "-" if row["between"] is None else f"{row['between']:.2f}"
        probes = (f"{row[key]:.0%}" for key in ("linear", "gaussian"))
        rows.add_row(str(row["layer"]), f"{row['within']:.2f}", between, *probes)
    console.print(rows)


def _draw(done: Similarity, layer: int, path: str, name: str) -> None:
    from localsteer.heatmap import draw_heatmap, new_figure, save_figure

    k = len(done.instructions)
    height = 2.5 + max(0.32 * k, 2.0)
    figure = new_figure(6.0 + 0.5 * done.n_layer + 1.2 * max(k, 4) + 4, height)
    within, matrix, lines = figure.subplots(
        1, 3, width_ratios=[done.n_layer * 0.6 + 1, max(k, 4) * 0.7 + 1, 5]
    )
    layers = list(range(done.n_layer))
    draw_heatmap(within, done.instructions, layers, done.within.tolist(), low=0, high=1)
    within.set(title=f"{name}: within an instruction", xlabel="layer")
    values = done.matrix[layer].tolist()
    draw_heatmap(matrix, done.instructions, done.instructions, values, low=0, high=1)
    matrix.set_title(f"within and between, layer {layer}")
    rows = done.rows()
    for key in ("within", "between", "linear", "gaussian"):
        label = f"{key} probe" if key in ("linear", "gaussian") else f"cosine {key}"
        # the probes' lines often coincide
        style = "--" if key == "gaussian" else "-"
        values = [row[key] if row[key] is not None else float("nan") for row in rows]
        lines.plot(layers, values, style, label=label)
    lines.set(title="means over instructions", xlabel="layer", ylim=(-0.1, 1.05))
    lines.legend()
    save_figure(figure, path)
