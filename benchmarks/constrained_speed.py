"""What a constraint costs: tokens per second under a JSON schema and its like, as a ratio to free replies.

    python benchmarks/constrained_speed.py [-m MODEL ...] [--threads 1] [--tokens 96] [--rounds 3]

A model is a file, or a name as `-m smol` takes it; the bundled one by default. At every token both draws
are made from the same logits, and the reply goes on with the constrained one, so both have the same decode to
wait for. With one thread its own processor time counts, and other programs on the machine do not. Printed for
each constraint and way of drawing: the ratio of the two speeds, both speeds, the cost of a mask beyond a free
draw (median), the worst draw, and that of compiling. The last line is JSON. Exit status 1 if a ratio is below
0.95.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from localsteer import Ask, Engine, Sampling
from localsteer.constrain import Constraint
from localsteer.model_names import path_of
from localsteer.plan import PositionClass, position_classes
from localsteer.runtime.bridge import default_threads
from localsteer.runtime.loop import new_request, new_sampler

FLOOR = 0.95
PROMPT = "Describe three animals of the forest as JSON, with all that you know of them."
ANIMAL = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "legs": {"type": "integer", "minimum": 0, "maximum": 8},
        "habitat": {"enum": ["forest", "river", "field"]},
        "food": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        "notes": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["name", "legs", "habitat", "food", "notes"],
    "additionalProperties": False,
}
LIST = {"type": "array", "items": {"$ref": "#/$defs/A"}, "minItems": 2, "$defs": {"A": ANIMAL}}
CONSTRAINTS = {
    "json_schema": Constraint.json_schema(LIST),
    "json_object": Constraint.json_object(),
    "regex": Constraint.regex(r"(?:[A-Z][a-z]+(?: [a-z]+){3,12}\. ?){2,}"),
    "tool call": Constraint.tool_call(
        [("describe", ANIMAL), ("count", {"properties": {"n": {"type": "integer"}}, "required": ["n"]})]
    ),
    "GBNF": Constraint.gbnf('root ::= "- " line ("\\n- " line)*\nline ::= [A-Za-z ,.]{20,120}'),
}
DRAWS = {"greedy": Sampling(temp=0), "sampled": Sampling(seed=1)}


@dataclass
class Times:
    """Seconds of each token: the decode that both draws wait for, and either draw."""

    decode: list[float] = field(default_factory=list)
    free: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    compile: float = 0.0

    def row(self) -> dict[str, float]:
        decode, free, kept = (np.array(seconds) for seconds in (self.decode, self.free, self.kept))
        return {
            "ratio": round(float((decode + free).sum() / (decode + kept).sum()), 4),
            "free_per_second": round(float(1 / (decode + free).mean()), 1),
            "kept_per_second": round(float(1 / (decode + kept).mean()), 1),
            "draw_us": round(float(1e6 * np.median(kept - free)), 1),
            "worst_draw_us": round(float(1e6 * kept.max()), 1),
            "compile_ms": round(1e3 * self.compile, 1),
            "tokens": len(kept),
        }


def reply(
    engine: Engine,
    sampling: Sampling,
    constraint: Constraint,
    n_tokens: int,
    times: Times,
    clock: Callable[[], float],
) -> None:
    started = clock()
    kept_by = Sampling(temp=sampling.temp, seed=sampling.seed, grammar=constraint)
    request = new_request(engine, Ask(PROMPT, sampling=kept_by))
    times.compile = max(times.compile, clock() - started)
    kept = new_sampler(engine, request)
    free = new_sampler(engine, new_request(engine, Ask(PROMPT, sampling=sampling)))
    prompt = np.asarray(engine.prompt_tokens(PROMPT), np.int32)
    engine.begin()
    positions = np.arange(len(prompt))
    classes = position_classes(positions, len(prompt))
    engine.context.decode(
        prompt, positions, 0 * positions, positions == positions[-1], [None] * len(prompt), classes
    )
    for position in range(len(prompt), min(engine.n_ctx, len(prompt) + n_tokens)):
        t0 = clock()
        _ = free.sample(engine.context) if free else int(engine.context.all_logits().argmax(axis=1)[0])
        t1 = clock()
        token = kept.sample(engine.context)
        t2 = clock()
        if engine.ends(token):
            return
        engine.context.decode([token], [position], [0], [True], [None], [PositionClass.GENERATION])
        times.free.append(t1 - t0)
        times.kept.append(t2 - t1)
        times.decode.append(clock() - t2)


def measure(model: str, n_threads: int, n_tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    rows = {}
    clock = time.thread_time if n_threads == 1 else time.perf_counter
    with Engine(path_of(model), n_threads=n_threads) as engine:
        started = time.perf_counter()
        _ = engine.token_bytes
        print(f"{model}: {engine.model.n_vocab} tokens read in {time.perf_counter() - started:.2f} s")
        for name, constraint in CONSTRAINTS.items():
            for how, sampling in DRAWS.items():
                times = Times()
                for _ in range(rounds):
                    reply(engine, sampling, constraint, n_tokens, times, clock)
                row = rows[f"{name}, {how}"] = times.row()
                print(
                    f"  {name + ', ' + how:22} " + "  ".join(f"{key} {row[key]}" for key in row), flush=True
                )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", action="append", metavar="MODEL")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    models = arguments.model or ["bundled"]
    found = {model: measure(model, arguments.threads, arguments.tokens, arguments.rounds) for model in models}
    worst = min(row["ratio"] for rows in found.values() for row in rows.values())
    print(
        json.dumps(
            {"worst": worst, "threads": arguments.threads, "machine": platform.machine(), "models": found}
        )
    )
    return 0 if worst >= FLOOR else 1


if __name__ == "__main__":
    sys.exit(main())
