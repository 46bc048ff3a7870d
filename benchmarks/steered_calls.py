"""What steering does to tool calls, and what it spares them to stay plain inside.

    python benchmarks/steered_calls.py -m MODEL.gguf [--instruction uppercase ...] [--strength 1] [--block N]

The model's template must show tools. For each instruction a vector is extracted from the model itself (mean
difference, `add`), and every question is asked of two tools: plain, steered everywhere, steered with calls
kept plain (Ask.plain_forms); once with a call that must be made, held to the tools' schemas, and once freely,
where the model is only told of the tools. Counted: calls that parse, that validate, and that hold the very
city that the question names. Beside it how many free texts, without tools, the verifier of the instruction
passes, so that it is seen whether the vector steers at all. The last line is JSON.

Exit status 1 if calls kept plain validate less often than the plain model's by more than one question.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass

import jsonschema

from localsteer import Engine, Sampling
from localsteer.catalog import load_catalog
from localsteer.constrain import Constraint
from localsteer.extract import extract
from localsteer.model_names import path_of
from localsteer.server.schemas import Tool
from localsteer.server.tools import parse
from localsteer.vector import ControlVector
from localsteer.verify.verdicts import verify

PLACES = ("Paris", "Oslo", "Lima", "Cairo", "Tokyo", "Quito", "Delhi", "Rome", "Kyiv", "Dublin")
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
WAYS = {"plain": False, "steered everywhere": False, "forms plain": True}
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


def ask(engine: Engine, vector: ControlVector | None, *, forced: bool, plain_forms: bool) -> Counts:
    prompts = [engine.render([{"role": "user", "content": text}], tools=TOOLS) for text in ASKED]
    functions = [tool["function"] for tool in TOOLS]
    call = Constraint.tool_call([(tool["name"], tool["parameters"]) for tool in functions])
    replies = engine.generate_batch(
        prompts,
        steer=() if vector is None else vector,
        sampling=Sampling(temp=0, grammar=call) if forced else GREEDY,
        max_tokens=80,
        raw=True,
        plain_forms=plain_forms,
    )
    counts = Counts()
    for question, reply in zip(ASKED, replies, strict=True):
        counts.add(question, reply.text)
    return counts


def follow_rate(engine: Engine, vector: ControlVector) -> float:
    replies = engine.generate_batch(TEXTS, steer=vector, sampling=GREEDY, max_tokens=50)
    known = vector.provenance
    passed = [verify(known["verifier"], reply.text, known.get("kwargs") or {}) for reply in replies]
    return sum(passed) / len(passed)


def vector_of(engine: Engine, name: str, block: int, strength: float) -> ControlVector:
    catalog = load_catalog("general")
    instruction = catalog.get(name)
    queries = catalog.queries_for(instruction, "extraction")
    made = extract(engine, instruction, queries, n_pairs=24, mode="add")
    return made.at(layer=block, positions="all", strength=strength)


def measure(engine: Engine, args: argparse.Namespace) -> dict[str, object]:
    found: dict[str, object] = {}
    base = {
        kind: ask(engine, None, forced=kind == "forced", plain_forms=False) for kind in ("forced", "free")
    }
    block = args.block if args.block is not None else engine.model.n_layer // 2
    for name in args.instruction:
        vector = vector_of(engine, name, block, args.strength)
        rate = follow_rate(engine, vector)
        print(f"{name}, block {block}, strength {args.strength:g}: {rate:.0%} of free texts follow")
        rows: dict[str, object] = {"follow": rate}
        for kind, plain in base.items():
            for way, plain_forms in WAYS.items():
                counts = plain
                if way != "plain":
                    counts = ask(engine, vector, forced=kind == "forced", plain_forms=plain_forms)
                print(
                    f"  {kind:<7}{way:<19} {counts.parsed:>3} parse  {counts.valid:>3} validate  "
                    f"{counts.right:>3} with the right city, of {counts.n}"
                )
                rows[f"{kind}, {way}"] = vars(counts)
        found[name] = rows
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--instruction", nargs="+", default=["uppercase", "lowercase", "quotation"])
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--block", type=int)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    started = time.perf_counter()
    with Engine(path_of(args.model), n_threads=args.threads, n_seq_max=8, n_ctx=1024) as engine:
        if not engine.template.takes_tools:
            sys.exit(f"the chat template of {args.model} shows no tools: give another model.")
        found = measure(engine, args)
    print(f"{time.perf_counter() - started:.0f} s, {args.threads} thread(s), {platform.processor() or 'CPU'}")
    print(json.dumps(found))
    lost = [
        f"{name} {kind}"
        for name, rows in found.items()
        for kind in ("forced", "free")
        if rows[f"{kind}, forms plain"]["valid"] < rows[f"{kind}, plain"]["valid"] - 1
    ]
    if lost:
        print(f"calls are lost with forms kept plain: {', '.join(lost)}", file=sys.stderr)
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main())
