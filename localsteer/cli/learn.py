"""`localsteer learn`: learns a vector for an instruction that the model does not follow. Needs PyTorch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localsteer.errors import LocalsteerError
from localsteer.terms import LEARNING_NEEDS, POSITIONS

from . import interrupt, options
from .console import answer, note, print_json, progress
from .extract import output_path
from .models import catalog_of, extraction_queries, find_instruction, model_file, open_engine
from .options import Params

if TYPE_CHECKING:
    from localsteer.catalog import Catalog, Instruction, Query
    from localsteer.engine import Engine
    from localsteer.learn import Kept, Lesson

N_SEQ_MAX = 16


@click.command("learn", short_help="Learn a vector for an instruction that telling fails at (needs PyTorch).")
@options.model
@click.option(
    "-i",
    "--instruction",
    "text",
    metavar="ID_OR_TEXT",
    help="What the replies should be like: an instruction of the catalogue, or a name for your --examples.",
)
@click.option(
    "--examples",
    type=click.Path(),
    metavar="JSONL",
    help='Your own replies to learn from, one {"prompt": ..., "reply": ...} per line; a dozen are enough.',
)
@click.option("-o", "--output", type=click.Path(), metavar="PATH", help="The vector file. [default: ID.gguf]")
@click.option(
    "--static",
    is_flag=True,
    help="Learn a constant: an ordinary control vector, which llama.cpp and others apply as it is.",
)
@options.layers_to_try(
    "Layers to choose from: 12, 3,4 or 3-5. [default: two in the upper half; --together: four]"
)
@click.option(
    "--together/--race",
    default=None,
    help="Edit all these layers, or only the one that is best after a few steps. [default: --together with "
    "--examples]",
)
@click.option(
    "--positions",
    type=click.Choice(POSITIONS),
    default="all",
    show_default=True,
    help="Which tokens are steered.",
)
@click.option(
    "--steps",
    default=50,
    show_default=True,
    type=click.IntRange(min=1),
    help="At most this many gradient steps on the examples; half as many follow on the model's own replies.",
)
@click.option(
    "--rate",
    default=0.012,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Learning rate; halved whenever the loss diverges.",
)
@click.option(
    "--checkpoint",
    metavar="HF",
    help="The transformers checkpoint of MODEL, a folder or a name. [default: the GGUF's own weights]",
)
@click.option(
    "--catalog",
    metavar="TOML",
    help="Instructions and queries. [default: bundled for the bundled model, else general]",
)
@click.option("--seed", default=0, show_default=True, help="Seed for everything random.")
@click.option("--plot", type=click.Path(), metavar="PNG", help="Draw the loss into a picture.")
@options.engine
@options.as_json
def command(
    model: str, text: str | None, examples: str | None, output: str | None, as_json: bool, **params: Any
) -> None:
    """Learn a vector that makes MODEL follow an instruction that it does not follow when told to.

    It learns from replies: the told model's if they follow, otherwise the model's own plain replies,
    rewritten to follow, or yours (--examples). An edit at one layer, or at a few, is fitted, step by step, to
    make these likely after the plain prompts, and is then checked on replies of the quantized model. This
    takes several minutes on a small model. The learned vector does not need PyTorch.

    Ctrl-C keeps the best so far. The same command continues a run that was killed.

    \b
    Examples:
      localsteer learn -m smol --instruction json -o json.gguf
      localsteer run -m smol -s json.gguf "Tell me about foxes."
      localsteer learn -m MODEL.gguf --examples replies.jsonl -o tone.gguf
      localsteer learn -m MODEL.gguf -i lowercase --static -o lowercase.gguf
    """
    _check_installed()
    job = _job(model, text, examples, output, params)
    loading = {name: params[name] for name in ("ctx_size", "threads", "gpu_layers")}
    with open_engine(model, n_seq_max=N_SEQ_MAX, **loading) as engine:
        lesson = _learn(engine, job, model, params)
    lesson.vector.save(job.target)
    if lesson.record["stopped"]:
        interrupt.forgive()  # Ctrl-C ended the steps, not the program
    if params["plot"]:
        _draw(lesson, params["plot"])
    document = {
        "written": str(job.target),
        "instruction": job.instruction.id,
        "layers": list(lesson.vector.layers),
        "strength": lesson.vector.strength,
        "validation": lesson.record,
    }
    if as_json:
        print_json(document)
    else:
        _show(job, lesson)


def _check_installed() -> None:
    missing = [name for name in LEARNING_NEEDS if find_spec(name) is None]
    if missing:
        raise LocalsteerError(
            f"learning needs PyTorch ({' and '.join(missing)} missing): pip install 'localsteer[torch]'. "
            "The learned vector does not need it."
        )


@dataclass(frozen=True)
class LearnJob:
    """What to learn, and from what. pairs: the user's examples, used instead of the queries."""

    instruction: Instruction
    target: Path
    queries: tuple[Query, ...]
    validation: tuple[Query, ...]
    pairs: Path | None
    catalog: Catalog


def _job(model: str, text: str | None, examples: str | None, output: str | None, params: Params) -> LearnJob:
    """The job. Refuses everything that can be refused without opening the model."""
    from localsteer.catalog import Instruction

    if text is None and examples is None:
        raise click.UsageError("say what to learn: --instruction ID, or --examples FILE.jsonl.")
    catalog = catalog_of(model, params["catalog"])
    if text is None:
        # there are no words to tell the model: nothing says what the examples have in common
        instruction = Instruction(Path(examples).stem, (), literal=True)
    else:
        instruction = find_instruction(catalog, text, ())
    if params["plot"]:
        from localsteer.heatmap import check_picture

        check_picture(params["plot"])
    return LearnJob(
        instruction=instruction,
        target=output_path(output, instruction),
        queries=extraction_queries(catalog, instruction, None),
        validation=catalog.queries_for(instruction, "validation"),
        pairs=None if examples is None else Path(examples),
        catalog=catalog,
    )


def _learn(engine: Engine, job: LearnJob, model: str, params: Params) -> Lesson:
    from localsteer.learn import Recipe, learn
    from localsteer.learn.examples import of_pairs

    pairs, queries = (None, job.queries) if job.pairs is None else of_pairs(engine, job.pairs)
    with progress(f"learning {job.instruction.id}") as advance:
        return learn(
            engine,
            job.instruction,
            queries,
            job.validation,
            Recipe(
                layers=params["layers"],
                together=params["together"],
                positions=params["positions"],
                constant=params["static"],
                n_steps=params["steps"],
                rate=params["rate"],
                seed=params["seed"],
            ),
            examples=pairs,
            checkpoint=params["checkpoint"],
            n_threads=params["threads"],
            kept=_kept(job, model, params),
            report=lambda what, done, total: advance(done, total, what),
        )


def _kept(job: LearnJob, model: str, params: Params) -> Kept:
    """Where this run's steps are kept, keyed by everything that determines them."""
    from localsteer.cache import HASH_CHARS, cache_folder, file_hash
    from localsteer.learn import Kept

    names = ("static", "layers", "together", "positions", "steps", "rate", "checkpoint", "seed")
    pairs = job.pairs and file_hash(job.pairs)
    content = [job.instruction.id, job.instruction.phrasings, [query.text for query in job.queries], pairs]
    digest = hashlib.sha256(json.dumps([content, [params[name] for name in names]]).encode()).hexdigest()
    folder = cache_folder() / "learn" / file_hash(model_file(model))[:HASH_CHARS]
    return Kept(folder / f"{job.instruction.id}-{digest[:8]}", digest)


def _show(job: LearnJob, lesson: Lesson) -> None:
    from localsteer.tune.setting import layers_in_words

    record, vector = lesson.record, lesson.vector
    scores = {name: "-" if share is None else f"{share:.0%}" for name, share in record["scores"].items()}
    answer().print(
        f"{job.instruction.id}: learned from {record['examples']['n']} {record['examples']['source']} "
        f"replies in {record['seconds']:.0f} s, {layers_in_words(vector.layers)}, {vector.positions}, "
        f"strength {vector.strength:g}.\n"
        + _checked(record["n"], scores, has_verifier=job.instruction.verifier is not None)
    )
    if not lesson.helps:
        note(
            "nothing that was learned does better than the plain model: the file gets strength "
            "0. Try more --steps."
        )
    note(f"wrote {job.target}")


def _checked(n: int, scores: Mapping[str, str], *, has_verifier: bool) -> str:
    if not has_verifier:
        return (
            f"Nothing judges its form: of {n} replies to other questions {scores['steered']} are unbroken; "
            f"plain {scores['none']}."
        )
    return (
        f"Of {n} replies to other questions {scores['steered']} follow it; plain {scores['none']}, told in "
        f"words {scores['instructed']}, both {scores['both']}."
    )


def _draw(lesson: Lesson, path: str) -> None:
    from localsteer.learn.curve import draw

    draw(lesson, path)
    note(f"drew {path}")
