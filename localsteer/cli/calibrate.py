"""`localsteer calibrate`: measures a vector's mean projections on the model that will run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options
from .console import answer, note, print_json, progress, table
from .extract import check_output
from .models import catalog_of, find_instruction, open_engine

if TYPE_CHECKING:
    from rich.table import Table

    from localsteer.engine import Engine
    from localsteer.extract import Pair
    from localsteer.extract.calibrate import Calibration
    from localsteer.vector import ControlVector

LOW_COSINE = 0.9  # of a steered layer; with less, this model's own direction is a different one


@click.command("calibrate", short_help="Re-measure a vector on the quantized model that will run.")
@click.argument("vector", metavar="VECTOR", type=click.Path())
@options.model
@click.option(
    "-o", "--output", type=click.Path(), metavar="GGUF", help="The calibrated file. [default: VECTOR itself]"
)
@click.option("--dry-run", is_flag=True, help="Report, and write nothing.")
@click.option(
    "-i",
    "--instruction",
    "text",
    metavar="ID_OR_TEXT",
    help="The vector's instruction, if its file does not say.",
)
@options.instruction_data
@options.threads
@options.as_json
def command(
    vector: str,
    model: str,
    output: str | None,
    dry_run: bool,
    as_json: bool,
    **params: Any,
) -> None:
    """Measure the mean projections and spreads of VECTOR again on MODEL, the quantization that will run.
    Directions and settings stay as they are. PyTorch is not needed.

    The pairs are those from which the vector was made: its phrasings, with the catalogue's queries or
    --queries. For each layer the table shows the cosine between the stored direction and this model's (1: the
    same), and how far the mean projection has drifted, in units of the distance by which the instruction
    moves it (0: not at all).

    \b
    Examples:
      localsteer calibrate -m MODEL.Q4_0.gguf json.gguf
      localsteer calibrate -m MODEL.Q2_K.gguf json.gguf -o json-q2.gguf
      localsteer calibrate -m bundled:Q3_K_M json.gguf --dry-run --json
    """
    from localsteer.vector import ControlVector

    stored = ControlVector.load(vector)
    path = Path(output or vector)
    if not dry_run and output is not None:
        check_output(path)
    chosen = _pairs(stored, model, params)
    with open_engine(model, threads=params["threads"]) as engine:
        done = _calibrate(engine, stored, chosen)
    if not dry_run:
        done.vector.save(path)
    if as_json:
        file = None if dry_run else str(path)
        print_json({"file": file, "n_pairs": len(chosen), "layers": done.rows()})
        return
    answer().print(_table(done))
    note(_summary(done) + ("" if dry_run else f" Written to {path}."))


def _pairs(vector: ControlVector, model: str, params: Mapping[str, Any]) -> list[Pair]:
    from localsteer.catalog import load_queries
    from localsteer.extract.calibrate import pairs_of

    text, slots = params["text"], params["slots"]
    if slots and text is None:
        raise click.UsageError("--slot fills a slot of --instruction: name the instruction too.")
    if text is not None and vector.phrasings:
        raise click.UsageError(
            f"{vector.label} already says what it was made from ({vector.phrasings[0]!r}): leave "
            "--instruction out."
        )
    catalog = catalog_of(model, params["catalog"])
    instruction = find_instruction(catalog, text, slots) if text else None
    queries = load_queries(params["queries"]) if params["queries"] else None
    return pairs_of(vector, catalog, instruction=instruction, queries=queries, n_pairs=params["pairs"])


def _calibrate(engine: Engine, vector: ControlVector, pairs: list[Pair]) -> Calibration:
    from localsteer.extract import open_backend
    from localsteer.extract.calibrate import calibrate, pairs_match

    engine.plan(vector)  # refuses a vector of another model
    with open_backend(engine) as backend, progress("calibrating") as on_progress:
        if pairs_match(vector, backend, pairs) is False:
            note(
                "these are not the pairs that the vector was made from: differences may be due to that. "
                "Name those of its extraction with --queries and --catalog."
            )
        return calibrate(backend, vector, pairs, on_progress=on_progress)


def _table(done: Calibration) -> Table:
    numbers = ("layer", "cosine", "drift", "mean before", "mean now", "spread", "length before", "here")
    shown = table(*numbers, "", numbers=numbers)
    keys = ("cosine", "drift", "mean_with_before", "mean_with", "std_with", "norm_before", "norm_here")
    formats = (".4f", "+.3f", ".3f", ".3f", ".3f", ".3f", ".3f")
    for row in done.rows():
        cells = [
            "-" if row[key] is None else format(row[key], f) for key, f in zip(keys, formats, strict=True)
        ]
        shown.add_row(str(row["layer"]), *cells, "steered" if row["chosen"] else "")
    return shown


def _summary(done: Calibration) -> str:
    """A sentence on what the figures of the steered layers mean."""
    rows = [row for row in done.rows() if row["chosen"]]
    where = ", ".join(str(row["layer"]) for row in rows)
    cosine = min((row["cosine"] for row in rows if row["cosine"] is not None), default=None)
    drifts = [abs(row["drift"]) for row in rows if row["drift"] is not None]
    if cosine is None:
        return f"Layer {where}: the instruction has no effect in this model."
    text = f"Layer {where}: cosine {cosine:.3f}"
    drifted = f", mean projection moved by {max(drifts):.1%} of the way." if drifts else ""
    text += drifted or "; the vector can now project."
    if cosine < LOW_COSINE:
        text += " This model's own direction is different: extract the vector from it instead."
    return text
