"""What steering does to tool calls, and what it spares them to stay plain inside.

    python benchmarks/steered_calls.py -m MODEL.gguf [--instruction title] [--strength 1.5] [--layer 16]

The model's template must show tools. A vector is extracted from the model itself (mean difference, `add`),
and every question is asked of two tools: plain, steered everywhere, and steered with calls kept plain
(Ask.plain_forms); once with a call that must be made, held to the tools' schemas, and once freely, where the
model is only told of the tools; steered at generated tokens, and at the prompt's as well. Counted: calls that
parse, that validate, and that hold the very city that the question names. Beside it how many texts without
tools the vector changes, and how many of these its verifier passes. The last line is JSON.

Exit status 1 if, steered at generated tokens and kept plain, calls validate less often than the plain model's
by more than one question. What steering the prompt does to a call is no form's concern.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jsonschema

from localsteer import Ask, Engine, Sampling, Scheduler
from localsteer.catalog import load_catalog
from localsteer.constrain import Constraint
from localsteer.extract import extract
from localsteer.model_names import path_of
from localsteer.server.schemas import Tool
from localsteer.server.tools import parse
from localsteer.vector import ControlVector
from localsteer.verify.verdicts import verify

PLACES = ("Paris", "Oslo", "Lima", "Cairo", "Tokyo", "Quito")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Name of the city, as the user writes it."},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "get_time",
            "description": "What time it is in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
]
ASKED = [
    question.format(place)
    for place in PLACES
    for question in ("What will the weather be in {} for the next 3 days?", "What time is it now in {}?")
]
TEXTS = tuple(f"Tell me about {place}." for place in PLACES)
KINDS = ("forced", "free")
WAYS = {"steered everywhere": False, "forms plain": True}
GREEDY = Sampling(temp=0)


@dataclass
class Counts:
    """Of the questions: calls that were made at all, that fit their schema, that have the right city."""

    n: int = 0
    parsed: int = 0
    valid: int = 0
    right: int = 0

    def add(self, question: str, text: str) -> None:
        self.n += 1
        _, calls = parse(text, [Tool.model_validate(tool) for tool in TOOLS])
        if not calls:
            return
        self.parsed += 1
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
        try:
            arguments = json.loads(calls[0].arguments)
            jsonschema.validate(arguments, schemas[calls[0].name])
        except (ValueError, jsonschema.ValidationError):
            return
        self.valid += 1
        self.right += arguments["city"] in question


def ask(scheduler: Scheduler, vector: ControlVector | None, *, forced: bool, plain_forms: bool) -> Counts:
    engine = scheduler.engine
    functions = [tool["function"] for tool in TOOLS]
    call = Constraint.tool_call([(tool["name"], tool["parameters"]) for tool in functions])
    common = Ask(
        steer=() if vector is None else vector,
        sampling=Sampling(temp=0, grammar=call) if forced else GREEDY,
        max_tokens=80,
        raw=True,
        plain_forms=plain_forms,
    )
    prompts = [engine.render([{"role": "user", "content": text}], tools=TOOLS) for text in ASKED]
    counts = Counts()
    for question, text in zip(ASKED, texts(scheduler, prompts, common), strict=True):
        counts.add(question, text)
    return counts


def texts(scheduler: Scheduler, prompts: Sequence[str], common: Ask) -> list[str]:
    """The first reply by itself: the others then take the beginning of their prompts, the tools, from it."""
    first = scheduler.submit(replace(common, prompt=prompts[0])).result().text
    tickets = [scheduler.submit(replace(common, prompt=prompt)) for prompt in prompts[1:]]
    return [first, *(ticket.result().text for ticket in tickets)]


def effect(scheduler: Scheduler, vector: ControlVector) -> dict[str, float]:
    """Shares of texts without tools that the vector changes, and that follow."""
    common = Ask(sampling=GREEDY, max_tokens=30)
    plain, steered = texts(scheduler, TEXTS, common), texts(scheduler, TEXTS, replace(common, steer=vector))
    known = vector.provenance
    passed = [verify(known["verifier"], text, known.get("kwargs") or {}) for text in steered]
    changed = [a != b for a, b in zip(plain, steered, strict=True)]
    return {"changed": sum(changed) / len(changed), "followed": sum(passed) / len(passed)}


def vector_of(engine: Engine, name: str, layer: int, strength: float) -> ControlVector:
    catalog = load_catalog("general")
    instruction = catalog.get(name)
    queries = catalog.queries_for(instruction, "extraction")
    extraction = extract(engine, instruction, queries, n_pairs=12, mode="add")
    return extraction.at(layer=layer, positions="all", strength=strength)


def measure(scheduler: Scheduler, args: argparse.Namespace) -> dict[str, object]:
    plain = {kind: ask(scheduler, None, forced=kind == "forced", plain_forms=False) for kind in KINDS}
    layer = scheduler.engine.model.n_layer // 2 if args.layer is None else args.layer
    with scheduler.paused() as engine:
        vector = vector_of(engine, args.instruction, layer, args.strength)
    found: dict[str, object] = {kind: vars(counts) for kind, counts in plain.items()}
    for kind, counts in plain.items():
        tell(kind, "plain", counts)
    for positions in ("generation", "all"):
        steered = vector.at(positions=positions)
        shares = effect(scheduler, steered)
        found[positions] = rows = {"effect": shares}
        print(
            f"{vector.name}, layer {layer}, strength {args.strength:g}, positions {positions}: "
            f"{shares['changed']:.0%} of texts changed, {shares['followed']:.0%} follow"
        )
        for kind in KINDS:
            for way, plain_forms in WAYS.items():
                counts = ask(scheduler, steered, forced=kind == "forced", plain_forms=plain_forms)
                tell(kind, way, counts)
                rows[f"{kind}, {way}"] = vars(counts)
    return found


def tell(kind: str, way: str, counts: Counts) -> None:
    print(
        f"  {kind:<7}{way:<19} {counts.parsed:>3} parse  {counts.valid:>3} validate  "
        f"{counts.right:>3} with the right city, of {counts.n}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--instruction", default="title")
    parser.add_argument("--strength", type=float, default=1.5)
    parser.add_argument("--layer", type=int)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    started = time.perf_counter()
    opener = partial(Engine, path_of(args.model), n_threads=args.threads, n_seq_max=6, n_ctx=1024)
    with Scheduler(opener) as scheduler:
        if not scheduler.engine.template.takes_tools:
            sys.exit(f"the chat template of {args.model} shows no tools: give another model.")
        counts = measure(scheduler, args)
    print(f"{time.perf_counter() - started:.0f} s, {args.threads} thread(s), {platform.processor() or 'CPU'}")
    print(json.dumps(counts))
    lost = [
        kind
        for kind in KINDS
        if counts["generation"][f"{kind}, forms plain"]["valid"] < counts[kind]["valid"] - 1
    ]
    if lost:
        print(f"calls are lost with forms kept plain: {', '.join(lost)}", file=sys.stderr)
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main())
