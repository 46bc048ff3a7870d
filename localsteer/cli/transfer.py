"""`localsteer transfer`: uses one model's vector in another model, and measures whether it works there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import click

from localsteer.errors import MismatchError

from . import options
from .console import answer, note, print_json, progress, table
from .extract import check_output, refuse_source
from .models import catalog_of, is_bundled, open_engine

if TYPE_CHECKING:
    from localsteer.catalog import Catalog, Instruction
    from localsteer.engine import Engine
    from localsteer.evaluate.transfer import ConditionRow, Examined
    from localsteer.extract import Backend, Pair
    from localsteer.extract.transfer import LayerMap
    from localsteer.vector import ControlVector

N_SEQ_MAX = 8
N_PROMPTS = 400  # that of extract.transfer


@click.command("transfer", short_help="Try a vector in another model, with controls.")
@click.argument("vector", metavar="VECTOR", type=click.Path())
@options.model
@click.option("-o", "--output", type=click.Path(), metavar="GGUF", help="Write the vector for MODEL here.")
@click.option("--map", "mapped", is_flag=True, help="Use a ridge map between the models' states.")
@click.option("--from", "source", metavar="GGUF", help="With --map: the model that VECTOR was made from.")
@click.option(
    "--prompts",
    type=click.IntRange(min=1),
    default=N_PROMPTS,
    show_default=True,
    metavar="N",
    help="With --map: prompts that both models read.",
)
@click.option(
    "--qa",
    is_flag=True,
    help="Prompt MODEL with `Q: ...` and `A:`, whatever its chat template: for base models.",
)
@click.option("--test/--no-test", default=True, help="Measure what the vector does in MODEL. [default: test]")
@click.option(
    "-n", default=20, show_default=True, type=click.IntRange(min=1), metavar="N", help="Test questions."
)
@click.option(
    "--catalog", metavar="TOML", help="Instructions and queries. [default: the model's, as for extract]"
)
@options.threads
@options.as_json
def command(
    vector: str,
    model: str,
    output: str | None,
    test: bool,
    as_json: bool,
    **params: Any,
) -> None:
    """Use VECTOR in MODEL, a different one than it was made from, and report whether it works there.

    In another quantization, or in the base model of an instruct model, the vector is used as it is. In
    another model of the same width it is used at the same relative depth, with mean projections measured
    again and a warning. For another width, --map fits a ridge map from the states of --from to those of
    MODEL, on prompts that hold other instructions.

    The test picks layer and positions on validation questions, and compares on test questions: plain MODEL,
    the transferred vector, MODEL's own vector, a random direction, and for a map also the unmapped numbers
    and a map fitted on shuffled prompts.

    \b
    Examples:
      localsteer transfer json.gguf -m bundled-base --qa
      localsteer transfer json.gguf -m MODEL.Q2_K.gguf -o json-q2.gguf
      localsteer transfer json.gguf --map --from SMALL.gguf -m LARGE.gguf -o json-large.gguf
    """
    from localsteer.extract.calibrate import instruction_of
    from localsteer.vector import ControlVector

    mapped, source = params["mapped"], params["source"]
    if mapped != (source is not None):
        raise click.UsageError("--map and --from belong together: --map --from MODEL.gguf.")
    stored = ControlVector.load(vector)
    if output is not None:
        check_output(Path(output))
        refuse_source(Path(output), vector)
    catalog = catalog_of(model, params["catalog"])
    if test or mapped:
        instruction_of(stored)  # refuses a vector that does not name its instruction
    job = _Job(stored, catalog, model, source, params["prompts"], params["threads"])
    with job.open(model, plain_prompts=params["qa"]) as engine:
        sent = job.send(engine)
        examined = _examine(job, engine, sent, params["n"]) if test else None
    written = sent.vector if examined is None else examined.vector
    if output is not None:
        written.save(output)
    if as_json:
        print_json(_document(job, sent, examined, written, output))
        return
    _print(sent, examined)
    if output is not None:
        note(f"written to {output}.")


class _Job:
    """The vector, the models and the queries of a transfer."""

    def __init__(
        self,
        vector: ControlVector,
        catalog: Catalog,
        model: str,
        source: str | None,
        n_prompts: int,
        threads: int | None,
    ) -> None:
        self.vector, self.catalog, self.model, self.source = vector, catalog, model, source
        self.n_prompts, self.threads = n_prompts, threads

    def open(self, model: str, **options: Any) -> Any:
        return open_engine(model, threads=self.threads, n_seq_max=N_SEQ_MAX, **options)

    @property
    def instruction(self) -> Instruction:
        from localsteer.extract.calibrate import instruction_of

        return instruction_of(self.vector)

    def pairs(self) -> list[Pair]:
        from localsteer.extract.calibrate import pairs_of

        return pairs_of(self.vector, self.catalog)

    def send(self, engine: Engine) -> _Sent:
        """The vector for the engine's model. Raises MismatchError for another width without a map."""
        from localsteer.extract import open_backend, transfer

        with open_backend(engine) as target:
            if self.source is not None:
                return self._send_through_map(target)
            way = transfer.relation(self.vector, target)
            if way == transfer.MAPPED:
                raise MismatchError(
                    f"{self.vector.label} is {self.vector.n_embd} wide but {target.model_name} is "
                    f"{target.n_embd}: add --map --from MODEL.gguf, the model that it was made from."
                )
            if way == transfer.AS_IS:
                return _Sent(way, transfer.carry(self.vector, target))
            note(
                f"{self.vector.label} was made for another model than {target.model_name}, of the "
                "same width: its "
                "directions may mean nothing there. Mean projections are measured again."
            )
            return _Sent(way, transfer.carry_to_other_model(self.vector, target, self.pairs()))

    def _send_through_map(self, target: Backend) -> _Sent:
        from localsteer.extract import open_backend, transfer

        prompts = transfer.shared_prompts(self.catalog, self.instruction, self.n_prompts)
        with self.open(self.source) as engine, open_backend(engine) as source:
            engine.plan(self.vector)  # refuses a source other than the vector's own model
            asked, prompts = len(prompts), transfer.readable(prompts, source, target)
            left_out = asked - len(prompts)
            if left_out:
                note(
                    f"{left_out} of {asked} prompts are left out: they are too long for one of the models, "
                    "or contain something for which it has no tokens."
                )
            texts = [pair.instructed for pair in prompts]
            with progress(f"reading states of {source.model_name}") as on_progress:
                theirs = transfer.all_states(source, texts, on_progress)
                means = transfer.mean_states(source, self.pairs())
        with progress(f"reading states of {target.model_name}") as on_progress:
            ours = transfer.all_states(target, texts, on_progress)
        queries = [pair.plain for pair in prompts]
        maps = transfer.fit_maps(theirs, ours, queries)
        sent = transfer.send_through(self.vector, target, maps, means)
        wrong = transfer.fit_maps(theirs, ours, queries, shuffle=True)
        control = transfer.send_through(self.vector, target, wrong, means)
        return _Sent(transfer.MAPPED, sent, maps, control)


class _Sent:
    """The transferred vector; for a map also its fits, and the vector of the shuffled map."""

    def __init__(
        self,
        way: str,
        vector: ControlVector,
        maps: list[LayerMap] | None = None,
        shuffled: ControlVector | None = None,
    ) -> None:
        self.way, self.vector, self.maps, self.shuffled = way, vector, maps or [], shuffled


def _examine(job: _Job, engine: Engine, sent: _Sent, n: int) -> Examined | None:
    from localsteer.evaluate.bench import BUNDLED_LIMITS
    from localsteer.evaluate.transfer import examine
    from localsteer.extract.transfer import UNMAPPED, unmapped
    from localsteer.runtime.journal import Journal, Remembered

    known = len(job.catalog.queries_for(job.instruction, "test"))
    if n > known:
        note(f"there are {known} test questions for {job.instruction.id}, not {n}.")
    if job.instruction.verifier is None:
        note(
            f"{job.vector.label} has no verifier, so nothing can judge whether a reply follows "
            "it: not tested."
        )
        return None
    limits = {}
    if is_bundled(job.model):
        limits = {"max_tokens": BUNDLED_LIMITS.max_tokens, "must_end": BUNDLED_LIMITS.must_end}

    def controls(plain_mean: Any) -> dict[str, ControlVector]:
        if sent.shuffled is None:
            return {}
        return {UNMAPPED: unmapped(job.vector, sent.vector, plain_mean), "shuffled map": sent.shuffled}

    with progress("picking settings") as on_progress:
        return examine(
            Remembered(engine, Journal(None, {})),
            job.instruction,
            sent.vector,
            job.catalog,
            controls=controls,
            n=n,
            on_progress=on_progress,
            **limits,
        )


class MappedLayer(TypedDict):
    layer: int
    source: int
    ridge: float
    r2: float


class TransferDocument(TypedDict):
    """lifts: over each control, with its interval. None, or empty: it was not tested."""

    file: str | None
    model: str
    way: str
    map: list[MappedLayer]
    layer: list[int]
    positions: str
    helped_in_validation: bool | None
    conditions: list[ConditionRow]
    lifts: dict[str, list[float]]
    verdict: str | None


def _document(
    job: _Job, sent: _Sent, examined: Examined | None, vector: ControlVector, output: str | None
) -> TransferDocument:
    return {
        "file": output,
        "model": job.model,
        "way": sent.way,
        "map": [
            {"layer": t, "source": one.source, "ridge": one.ridge, "r2": one.r2}
            for t, one in enumerate(sent.maps)
        ],
        "layer": list(vector.layers),
        "positions": vector.positions,
        "helped_in_validation": None if examined is None else examined.helped,
        "conditions": [] if examined is None else examined.rows(),
        "lifts": {}
        if examined is None
        else {name: list(interval) for name, interval in examined.lifts.items()},
        "verdict": None if examined is None else examined.verdict,
    }


def _print(sent: _Sent, examined: Examined | None) -> None:
    console = answer()
    if sent.maps:
        rows = table("layer", "from layer", "R2 held out", "ridge", numbers=("layer", "from layer", "ridge"))
        for t, layer_map in enumerate(sent.maps):
            rows.add_row(str(t), str(layer_map.source), f"{layer_map.r2:.3f}", f"{layer_map.ridge:g}")
        console.print(rows)
        console.print()
    if examined is None:
        console.print(f"{sent.vector.label}: {sent.way}, not tested", soft_wrap=True)
        return
    numbers = ("follow", "95%", "kept", "degenerate")
    vector = examined.vector
    layers = ", ".join(map(str, vector.layers))
    title = f"{vector.label}, {sent.way}: layer {layers}, positions {vector.positions}"
    rows = table("condition", *numbers, numbers=numbers, title=title)
    for row in examined.rows():
        # the bootstrap interval of equal replies is a point, which would look like certainty
        spread = "" if row["low"] == row["high"] else f"{row['low']:.0%}-{row['high']:.0%}"
        cells = ["-" if row[key] is None else f"{row[key]:.0%}" for key in ("subject_kept", "degenerate")]
        rows.add_row(row["condition"], f"{row['followed']:.0%}", spread, *cells)
    console.print(rows)
    console.print()
    console.print(examined.verdict, soft_wrap=True)
