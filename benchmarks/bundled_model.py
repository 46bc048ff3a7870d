"""What the bundled model can do: following instructions in the prompt, and being steered without them.

    python benchmarks/bundled_model.py [--quick] [--out docs/results]

Told: every kind of instruction and pairs of them, subjects never trained, with phrasings of training and with
phrasings never trained. Steered: three ways of choosing settings, on each quantization, all conditions and
several controls, with bootstrap intervals over the questions. Writes bundled-model.md and bundled-model.json,
prints the tables, and one line of JSON at the end. Exit status 1 when a bar of the table is missed.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localsteer import __version__, bundled
from localsteer.catalog import Instruction as Steered
from localsteer.catalog import load_catalog
from localsteer.demo import GROUPS
from localsteer.engine import Engine
from localsteer.evaluate.bench import BUNDLED_LIMITS, Bench
from localsteer.evaluate.cells import Experiment, arms_of
from localsteer.evaluate.controls import N_TOLD, choose_others
from localsteer.evaluate.intervals import interval
from localsteer.evaluate.outcomes import Outcome, Outcomes
from localsteer.evaluate.runner import Advance, by_instruction
from localsteer.runtime.bridge import default_threads, system_info
from localsteer.runtime.reply import Reply
from localsteer.runtime.sampling import GREEDY
from localsteer.tune import POSITIONS, Tuned
from localsteer.verify.quality import is_degenerate, subject_kept
from localsteer.workers import Workers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "bundled_model"))
import world  # noqa: E402

QUANTS = ("Q8_0", "Q4_K_M")
SEED = 5
CHUNK = 200  # prompts of one piece of work
MAX_TOLD = 200  # tokens: eight sentences of Spanish or German take 140
WORD_KINDS = ("include_word", "exclude_word")


@dataclass(frozen=True)
class Size:
    """How much is asked. told: samples for each kind and phrasing; pairs: samples of two instructions."""

    told: int
    pairs: int
    test: int


FULL = Size(told=20, pairs=600, test=20)
QUICK = Size(told=6, pairs=30, test=8)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- told in the prompt -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """One exchange and its verdicts. unasked: the plain reply happens to follow the instruction too."""

    group: str
    prompt: str
    reply: str
    followed: bool
    unasked: bool
    named: bool


def told_samples(size: Size) -> Iterator[tuple[str, world.Sample]]:
    """(group, sample): subjects and partly questions that were never trained."""
    rng, pool = random.Random(SEED), world.subjects()["test"]
    for wording in ("train", "held_out"):
        phrasings = world.load_phrasings(wording)

        def draw(
            *instructions: world.Instruction, phrasings: dict[str, list[str]] = phrasings
        ) -> world.Sample:
            return world.draw_sample(rng, pool, phrasings, list(instructions), "test")

        for kind in world.SLOT:
            for _ in range(size.told):
                yield f"{wording}/{kind}", draw(world.Instruction(kind, world.draw_args(kind, rng)))
        for kind, words in zip(WORD_KINDS, (world.HELD_OUT_WORDS, world.HELD_OUT_AVOIDABLE), strict=True):
            for _ in range(size.told):
                yield (
                    f"{wording}/{kind}: new words",
                    draw(world.Instruction(kind, {"word": rng.choice(words)})),
                )
        for _ in range(size.pairs):
            yield f"{wording}/pairs", draw(*_pair(rng))


def _pair(rng: random.Random) -> list[world.Instruction]:
    kinds = list(world.SLOT)
    while not world.compatible(*(chosen := rng.sample(kinds, 2))):
        pass
    return world.with_arguments(chosen, rng)


def ask_in_words(workers: Workers, size: Size) -> list[Told]:
    samples = list(told_samples(size))
    plain = list(dict.fromkeys(sample.question for _, sample in samples))
    prompts = [*(sample.prompt for _, sample in samples), *plain]
    parts = [prompts[start : start + CHUNK] for start in range(0, len(prompts), CHUNK)]
    replies = [reply for part in workers.map(_greedy, parts) for reply in part]
    unasked = dict(zip(plain, replies[len(samples) :], strict=True))
    told = []
    for (group, sample), reply in zip(samples, replies, strict=False):
        told.append(
            Told(
                group,
                sample.prompt,
                reply.text,
                _follows(sample, reply.text, reply.finish_reason),
                _follows(sample, unasked[sample.question].text, "stop"),
                subject_kept(reply.text, sample.subject.name),
            )
        )
    return told


def _greedy(engine: Engine, prompts: Sequence[str]) -> list[Reply]:
    return engine.generate_batch(prompts, max_tokens=MAX_TOLD, sampling=GREEDY)


def _follows(sample: world.Sample, text: str, finish_reason: str) -> bool:
    """The world's own checks: stricter than IFEval's where a count is exact."""
    if is_degenerate(text) or finish_reason == "length":
        return False
    return all(world.follows(instruction, text) for instruction in sample.instructions)


def told_table(told: Sequence[Told]) -> list[dict[str, Any]]:
    rows = []
    for group in dict.fromkeys(row.group for row in told):
        members = [row for row in told if row.group == group]
        wording, _, kind = group.partition("/")
        rows.append({"wording": wording, "kind": kind, "n": len(members), **_told_shares(members)})
    return rows


def _told_shares(members: Sequence[Told]) -> dict[str, float]:
    keys = ("followed", "unasked", "named")
    return {key: float(np.mean([getattr(member, key) for member in members])) for key in keys}


def told_means(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean over kinds, each kind alike, by wording; new words and pairs apart."""
    means = {}
    for name, chosen in _told_parts(rows).items():
        keys = ("followed", "unasked", "named")
        means[name] = {key: float(np.mean([row[key] for row in chosen])) for key in keys}
    return means


def _told_parts(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        apart = (
            "new words" if row["kind"].endswith("new words") else "pairs" if row["kind"] == "pairs" else ""
        )
        wording = "trained phrasings" if row["wording"] == "train" else "phrasings never trained"
        parts.setdefault(f"{apart}, {wording}" if apart else wording, []).append(row)
    return parts


# --- steered ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regime:
    """A way of choosing settings. bar: the least mean over formats and lengths."""

    name: str
    bar: float
    restrict: Callable[[int], dict[str, Any]]


def middle_layers(n_layer: int) -> range:
    """The layers from 25% to 75% of the depth: 2 to 5 of 8."""
    return range(-(-n_layer // 4), 3 * n_layer // 4)


REGIMES = (
    Regime("free", 0.92, lambda _n_layer: {"positions": POSITIONS}),
    Regime("middle, prompt", 0.85, lambda n: {"layers": middle_layers(n), "positions": ("prompt",)}),
    Regime("middle, all", 0.50, lambda n: {"layers": middle_layers(n), "positions": ("all",)}),
)


@dataclass(frozen=True)
class Steering:
    """One instruction in one regime. conditions: rows by condition."""

    instruction: Steered
    tuned: Tuned
    conditions: dict[str, Outcomes]

    def shares(self, condition: str, key: str = "followed") -> np.ndarray:
        """(n_queries,) 0 or 1; empty without the condition. key: followed, subject_kept or degenerate."""
        return np.array([_verdict(row, key) for row in self.conditions.get(condition, ())])


def _verdict(row: Outcome, key: str) -> float:
    if key == "degenerate":
        return float(row.degenerate is not None)
    return float(bool(row.strict if key == "followed" else row.subject_kept))


def steer_all(bench: Bench, ready: Sequence[Steered], regime: Regime) -> list[Steering]:
    """Words have no bar: one table of them, where settings are free, is enough."""
    free = regime.name == "free"
    wanted = [each for each in ready if free or each.group in GROUPS]
    raw = bench.vectors.raw(wanted)
    restricted = regime.restrict(bench.model["n_layer"])
    picks = bench.vectors.tune([(each, raw[each.id]) for each in wanted], **restricted)
    compared = [_conditions(bench, ready, *pair, free=free) for pair in zip(wanted, picks, strict=True)]
    rows = bench.run(compared, what="comparing conditions", score=("none", "steered")).by("instruction")
    return [
        Steering(instruction, tuned, rows[instruction.id].by("condition"))
        for instruction, tuned in zip(wanted, picks, strict=True)
    ]


def _conditions(
    bench: Bench, ready: Sequence[Steered], instruction: Steered, tuned: Tuned, *, free: bool
) -> Experiment:
    steers = {"none": (), "steered": (tuned.vector,)}
    if free:
        steers |= {"instructed": (), "both": (tuned.vector,)}
    if tuned.setting is not None:
        others = choose_others([instruction], ready, bench.vectors.told, bench.validation[:N_TOLD])
        raw = list(bench.vectors.raw(others).values())
        steers |= bench.controls.like([tuned.vector], raw)
    return bench.experiment(instruction, arms_of(steers, list(steers)), bench.test)


@contextmanager
def told_by_note(what: str) -> Iterator[Advance]:
    """A stage of a Bench."""
    note(f"    {what}")
    yield lambda _done, _total: None


def steered_row(each: Steering) -> dict[str, Any]:
    setting, steered = each.tuned.setting, each.conditions["steered"]
    shares = {
        name: each.shares(name) for name in ("none", "steered", "random", "other", "instructed", "both")
    }
    perplexities = {name: each.conditions[name].perplexity for name in ("none", "steered")}
    return {
        "id": each.instruction.id,
        "group": each.instruction.group,
        **{name: float(values.mean()) if values.size else None for name, values in shares.items()},
        "steered_interval": interval(shares["steered"][None]),
        "subject_kept": steered.subject_kept,
        "degenerate": steered.degenerate,
        "quality_none": perplexities["none"],
        "quality_steered": perplexities["steered"],
        "layer": setting.layer if setting else None,
        "positions": setting.positions if setting else None,
        "strength": setting.strength if setting else 0.0,
        "n": steered.n,
        "controls": {
            name: rows.followed
            for name, rows in each.conditions.items()
            if name.startswith(("random", "other"))
        },
    }


def steered_summary(found: Sequence[Steering]) -> dict[str, Any]:
    """Over formats and lengths: means with intervals, the worst instruction, what is left of the subject."""
    judged = [each for each in found if each.instruction.group in GROUPS]
    summary: dict[str, Any] = {}
    for name in ("none", "steered", "random", "other", "instructed", "both"):
        values = [each.shares(name) for each in judged]
        values = [row for row in values if row.size]
        if values:
            summary[name] = {"mean": float(np.mean(values)), "interval": interval(np.stack(values))}
    worst = min(judged, key=lambda each: each.shares("steered").mean())
    rates = {key: [each.shares("steered", key) for each in judged] for key in ("subject_kept", "degenerate")}
    highest = {
        name: max(
            (float(each.shares(name).mean()) for each in judged if each.shares(name).size), default=None
        )
        for name in ("none", "random", "other")
    }
    return summary | {
        "worst": {"id": worst.instruction.id, "steered": float(worst.shares("steered").mean())},
        "subject_kept": float(np.mean(rates["subject_kept"])),
        "degenerate": float(np.mean(rates["degenerate"])),
        "highest": highest,
    }


# --- the bars ---------------------------------------------------------------------------------------------


def bars(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Every promise about the bundled model, what was found, and whether it is kept."""
    told = document["told"]["means"]
    bars_checked = [
        _bar("told, trained phrasings: mean", told["trained phrasings"]["followed"], at_least=0.95),
        _bar(
            "told, phrasings never trained: mean", told["phrasings never trained"]["followed"], at_least=0.80
        ),
        _bar("told, two instructions: both", told["pairs, trained phrasings"]["followed"], at_least=0.95),
        _bar(
            "told, two instructions, phrasings never trained: both",
            told["pairs, phrasings never trained"]["followed"],
            at_least=0.80,
        ),
        _bar("told, trained phrasings: subject named", told["trained phrasings"]["named"], at_least=0.95),
    ]
    for quant, regimes in document["steered"].items():
        for regime in REGIMES:
            bars_checked += _regime_bars(quant, regime, regimes[regime.name]["summary"])
    return bars_checked


def _regime_bars(quant: str, regime: Regime, summary: dict[str, Any]) -> list[dict[str, Any]]:
    label = f"{quant}, {regime.name}"
    rows = [_bar(f"{label}: steered, mean", summary["steered"]["mean"], at_least=regime.bar)]
    for control in ("random", "other"):
        if control in summary:
            rows.append(_bar(f"{label}: {control}, mean", summary[control]["mean"], at_most=0.10))
    if regime.name != "free":
        return rows
    return [
        *rows,
        _bar(f"{label}: none, mean", summary["none"]["mean"], at_most=0.05),
        _bar(
            f"{label}: steered, worst ({summary['worst']['id']})", summary["worst"]["steered"], at_least=0.70
        ),
        _bar(f"{label}: subject named", summary["subject_kept"], at_least=0.95),
        _bar(f"{label}: degenerate replies", summary["degenerate"], at_most=0.0),
    ]


def _bar(
    what: str, value: float, *, at_least: float | None = None, at_most: float | None = None
) -> dict[str, Any]:
    met = value >= at_least if at_least is not None else value <= at_most
    return {"what": what, "value": value, "at_least": at_least, "at_most": at_most, "met": bool(met)}


# --- the report -------------------------------------------------------------------------------------------


def report(document: dict[str, Any]) -> str:
    parts = [INTRODUCTION.format(**document), _bars_table(document["bars"])]
    parts += ["## Told in the prompt", TOLD_TEXT, _told_markdown(document["told"])]
    parts += ["## Steered, without a word of instruction", STEERED_TEXT]
    for quant, regimes in document["steered"].items():
        for name, regime in regimes.items():
            parts += [
                f"### {quant}: {name}",
                _summary_line(regime["summary"]),
                _steered_markdown(regime["rows"]),
            ]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """\
# The bundled model: what it follows, and what steering does

Written by `python benchmarks/bundled_model.py` in {seconds:.0f} s: localsteer {version}, llama-cpp-python
{llama_cpp}, {machine}, {threads} threads. Greedy decoding. A degenerate reply (empty, looping, locked at its
start, or without an end) counts as a failure in every condition. The model was trained for this: the figures
show that the method is computed rightly, not how well another model takes to it."""
TOLD_TEXT = """\
The instruction stands in the prompt. Subjects were never trained, nor some wordings of the questions.
`unasked`: how often the plain reply follows by chance. `new words`: words never asked for in training."""
STEERED_TEXT = """\
Vectors are extracted from the quantized model itself, settings chosen on validation questions, figures from
test questions; subjects and question wordings are disjoint. `free`: any layer, positions prompt, last or all.
`middle`: the layers from 25% to 75% of the depth. `random`: random directions of equal norm and distance at
the last prompt token. `other`: other instructions' vectors at the same layer and positions, of those whose
own replies do not happen to follow this instruction. Intervals: 95%, bootstrap over the questions."""


def _bars_table(found: Sequence[dict[str, Any]]) -> str:
    rows = []
    for bar in found:
        limit = f"≥ {bar['at_least']:.0%}" if bar["at_least"] is not None else f"≤ {bar['at_most']:.0%}"
        rows.append([bar["what"], f"{bar['value']:.1%}", limit, "yes" if bar["met"] else "**no**"])
    return markdown(["what", "found", "bar", "met"], rows)


def _told_markdown(told: dict[str, Any]) -> str:
    means = [[name, *_percents(row, "followed", "unasked", "named")] for name, row in told["means"].items()]
    by_kind: dict[str, dict[str, dict[str, Any]]] = {}
    for row in told["rows"]:
        by_kind.setdefault(row["kind"], {})[row["wording"]] = row
    rows = []
    for kind, both in by_kind.items():
        trained, new = both["train"], both["held_out"]
        rows.append(
            [kind, *_percents(trained, "followed", "unasked", "named"), *_percents(new, "followed", "named")]
        )
    return "\n\n".join(
        [
            markdown(["mean over kinds", "followed", "unasked", "named"], means),
            markdown(["kind", "trained phrasings", "unasked", "named", "never trained", "named"], rows),
        ]
    )


def _summary_line(summary: dict[str, Any]) -> str:
    parts = []
    for name in ("none", "steered", "random", "other", "instructed", "both"):
        if name in summary:
            low, high = summary[name]["interval"]
            parts.append(f"{name} {summary[name]['mean']:.1%} ({low:.1%} to {high:.1%})")
    parts.append(f"subject named {summary['subject_kept']:.1%}, degenerate {summary['degenerate']:.1%}")
    return "Formats and lengths: " + "; ".join(parts) + "."


def _steered_markdown(rows: Sequence[dict[str, Any]]) -> str:
    shares = ("none", "steered", "random", "other", "instructed", "both", "subject_kept", "degenerate")
    lines = []
    for row in rows:
        low, high = row["steered_interval"]
        before, after = row["quality_none"], row["quality_steered"]
        lines.append(
            [
                row["id"],
                *_percents(row, *shares),
                f"{low:.0%} to {high:.0%}",
                "-" if after is None else f"{before:.1f} → {after:.1f}",
                "-" if row["layer"] is None else f"{row['layer']} {row['positions']} {row['strength']:g}",
            ]
        )
    header = ["instruction", "none", "steered", "random", "other", "told", "both", "named", "degenerate"]
    return markdown([*header, "steered, 95%", "perplexity", "setting"], lines)


def _percents(row: dict[str, Any], *keys: str) -> list[str]:
    return ["-" if row[key] is None else f"{row[key]:.0%}" for key in keys]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# --- running ----------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict[str, Any]:
    started, size = time.perf_counter(), QUICK if args.quick else FULL
    document: dict[str, Any] = {
        "version": __version__,
        "llama_cpp": system_info()["llama-cpp-python"],
        "machine": f"{platform.machine()} {platform.system()}",
        "threads": args.threads or default_threads(),
        "quick": args.quick,
        "steered": {},
    }
    for quant in args.quants:
        path = bundled.gguf_path("instruct", quant, folder=args.checkpoint)
        sizes = {"n_ctx": BUNDLED_LIMITS.n_ctx, "n_seq_max": BUNDLED_LIMITS.n_seq_max}
        with Workers(path, document["threads"], **sizes) as workers:
            if "told" not in document:
                note(f"told, on {quant}")
                rows = told_table(ask_in_words(workers, size))
                document["told"] = {"quant": quant, "rows": rows, "means": told_means(rows)}
            document["steered"][quant] = steer(workers, quant, size)
    document["seconds"] = time.perf_counter() - started
    return document | {"bars": bars(document)}


def steer(workers: Workers, quant: str, size: Size) -> dict[str, Any]:
    catalog = load_catalog(bundled.CATALOG)
    instructions = catalog.instructions.values()
    ready = [
        instruction for instruction in instructions if instruction.verifier and not instruction.open_slots
    ]
    options = {"n": size.test, "limits": BUNDLED_LIMITS, "stage": told_by_note}
    bench = Bench(workers, catalog, None, batch=by_instruction, **options)
    bench.vectors.prepare(ready)
    regimes = {}
    for regime in REGIMES:
        note(f"steered, {quant}, {regime.name}")
        steerings = steer_all(bench, ready, regime)
        regimes[regime.name] = {
            "summary": steered_summary(steerings),
            "rows": [steered_row(steering) for steering in steerings],
        }
    return regimes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="few questions: shows that it runs, measures little"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the report [default: docs/results; --quick: none]"
    )
    parser.add_argument("--checkpoint", type=Path, help="another checkpoint in the bundled model's place")
    parser.add_argument("--quants", nargs="+", default=QUANTS)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    document = run(args)
    text = report(document)
    print(text)
    out = args.out or (None if args.quick else ROOT / "docs" / "results")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "bundled-model.md").write_text(text, encoding="utf-8")
        (out / "bundled-model.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))
    sys.exit(0 if all(bar["met"] for bar in document["bars"]) else 1)


if __name__ == "__main__":
    main()
