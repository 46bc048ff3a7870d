"""`localsteer study`: open questions about steering, measured on the user's own model."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from . import options
from .console import answer, note, print_json, progress
from .models import catalog_of, is_bundled, model_file

NAMES = ("quantization", "pairs", "compound", "linear", "layers")  # those of evaluate.studies
N_TEST, N_QUICK = 20, 4


@click.command("study", short_help="Measure one question: quantization, pairs, compound, linear or layers.")
@click.argument("name", type=click.Choice(NAMES))
@options.model
@click.option(
    "-o", "--out", type=click.Path(), metavar="DIR", help="The folder for all results. [default: study-NAME]"
)
@click.option(
    "--gguf",
    "files",
    multiple=True,
    type=click.Path(),
    metavar="GGUF",
    help="quantization: a GGUF of the checkpoint; repeat, the most exact first. [default: bundled]",
)
@click.option("--checkpoint", metavar="HF", help="layers: the transformers folder of MODEL.")
@click.option(
    "-i", "--instructions", metavar="ID,ID", help="Instructions to use instead of the study's choice."
)
@click.option(
    "-n",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Test questions for each instruction. [default: {N_TEST}]",
)
@click.option("--quick", is_flag=True, help="Run everything small, to see that it works.")
@click.option("--catalog", metavar="TOML", help="Instructions and queries. [default: the model's]")
@click.option(
    "--seed", type=int, default=0, show_default=True, metavar="N", help="Seed for everything random."
)
@options.threads
@options.as_json
def command(
    name: str,
    model: str,
    files: tuple[str, ...],
    quick: bool,
    as_json: bool,
    **params: Any,
) -> None:
    """Measure one question on MODEL, and write results.json, NAME.md, pictures, and every reply to DIR.

    \b
    NAME asks:
      quantization  what each quantization does to directions, projections and steering
      pairs         how many prompt pairs a vector needs, and in how many wordings
      compound      three instructions at once
      linear        a linear and a non-linear probe beside steering, layer by layer
      layers        which layers can be steered, by PyTorch and by the engine (needs torch)

    The same command continues a run that was stopped. With the bundled model, each study takes some minutes
    on two cores.

    \b
    Examples:
      localsteer study quantization --quick
      localsteer study quantization --gguf M.F16.gguf --gguf M.Q8_0.gguf --gguf M.Q4_K_M.gguf
      localsteer study pairs -m MODEL.gguf -i json,lowercase -o study-pairs
      localsteer study layers -m MODEL.Q8_0.gguf --checkpoint HF_FOLDER
    """
    from localsteer.evaluate.bench import BUNDLED_LIMITS, EvalLimits
    from localsteer.evaluate.page import plain
    from localsteer.evaluate.report.terminal import print_report
    from localsteer.evaluate.studies.common import StudyJob, run_study

    _check_options(name, files, params["checkpoint"])
    bundled = is_bundled(model) and not files
    named = _files(name, files, bundled, quick)
    job = StudyJob(
        catalog=catalog_of(None if files else model, params["catalog"]),
        out=Path(params["out"] or f"study-{name}"),
        model=named[0][1] if named else model_file(model),
        limits=BUNDLED_LIMITS if bundled else EvalLimits(),
        n=params["n"] or (N_QUICK if quick else N_TEST),
        seed=params["seed"],
        wanted=_ids(params["instructions"]),
        quick=quick,
        n_threads=params["threads"],
        files=named,
        checkpoint=_checkpoint(params["checkpoint"], model) if name == "layers" else None,
        stage=progress,
    )
    results = run_study(name, job, command=shlex.join(["localsteer", *sys.argv[1:]]))
    if as_json:
        print_json(plain(results))
        return
    print_report(results, answer())
    note(f"{job.out / f'{name}.md'} has the whole report, {job.out / 'results.json'} all figures.")


def _check_options(name: str, files: tuple[str, ...], checkpoint: str | None) -> None:
    if files and name != "quantization":
        raise click.UsageError("--gguf belongs to `study quantization`; name the model with -m.")
    if checkpoint is not None and name != "layers":
        raise click.UsageError("--checkpoint belongs to `study layers`.")
    if len(files) == 1:
        raise click.UsageError(
            "name at least two files with --gguf: the study of quantization compares them."
        )


def _ids(instructions: str | None) -> tuple[str, ...] | None:
    if instructions is None:
        return None
    ids = tuple(name.strip() for name in instructions.split(",") if name.strip())
    if not ids:
        raise click.UsageError("--instructions is empty: leave it out for the study's choice.")
    return ids


def _files(name: str, files: tuple[str, ...], bundled: bool, quick: bool) -> tuple[tuple[str, Path], ...]:
    """Label and path of each file of `study quantization`."""
    if name != "quantization":
        return ()
    if files:
        paths = [model_file(file) for file in files]
        labels = [_label(path) for path in paths]
        # each file has a folder in OUT, named after it
        unique = [name if labels.count(name) == 1 else f"{k}-{name}" for k, name in enumerate(labels)]
        return tuple(zip(unique, paths, strict=True))
    if not bundled:
        raise click.UsageError("name the files with --gguf, the most exact first; -m takes only one file.")
    from localsteer.bundled import gguf_path
    from localsteer.evaluate.studies.quantization import QUANTS, QUICK_QUANTS

    quants = QUICK_QUANTS if quick else QUANTS
    return tuple((quant, gguf_path("instruct", quant, on_making=note)) for quant in quants)


def _label(path: Path) -> str:
    """`Q4_K_M` of `model.Q4_K_M.gguf`, else the file's name without its ending."""
    quantization = re.search(r"(?i)(?<![a-z0-9])(b?f(?:16|32)|i?q\d\w*)$", path.stem)
    return quantization[1].upper() if quantization else path.stem


def _checkpoint(checkpoint: str | None, model: str) -> Path:
    if checkpoint is not None:
        return Path(checkpoint)
    if not is_bundled(model):
        raise click.UsageError(
            "name the transformers model that MODEL was made from: --checkpoint HF_FOLDER."
        )
    from localsteer import bundled

    return bundled.checkpoint_folder("base" if "base" in model.split(":")[0] else "instruct")


__all__ = ["NAMES", "command"]
