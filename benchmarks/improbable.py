"""Where `localsteer tune` draws the line between a surprising reply and a broken one, on the bundled model.

    python benchmarks/improbable.py [--instructions json,lowercase,...] [--quant Q8_0] [-n 8]

Every layer and positions at strength 1 is asked; of the replies that pass every other check (verifier,
subject, no loop) the most improbable are shown, with how many times as surprising each is as the most
surprising reply that the model gives by itself. Whether they are sound text is for the reader to say. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from typing import Any

from localsteer import __version__, bundled
from localsteer.catalog import Catalog, Instruction, load_catalog, spread
from localsteer.engine import Engine
from localsteer.extract import extract
from localsteer.perplexity import log_perplexities
from localsteer.runtime.bridge import default_threads
from localsteer.tune import Check
from localsteer.tune.check import IMPROBABLE, IMPROBABLE_RATIO
from localsteer.tune.exhaustive import grid
from localsteer.workers import Workers

INSTRUCTIONS = (
    "json", "lowercase", "uppercase", "bullets", "title", "no_comma", "spanish", "one_sentence",
    "five_sentences", "quotation",
)  # fmt: skip
N_CTX, N_SEQ_MAX = 256, 16
MAX_TOKENS = 128
N_SHOWN = 60


def measure(engine: Engine, catalog: Catalog, instruction: Instruction, n: int) -> list[dict[str, Any]]:
    """A row for each reply that passes every other check: its ratio, its setting and its text."""
    vector = extract(engine, instruction, catalog.queries_for(instruction, "extraction"), mode="project")
    queries = spread(catalog.queries_for(instruction, "validation"), n)
    check = Check(engine, vector, instruction, queries, max_tokens=MAX_TOKENS)
    check.ask_model()
    own = log_perplexities(engine, [*check.plain.replies, *check.told.replies])
    most_surprising = max(value for value in own if value is not None)
    rows = []
    for trial in check.ask(grid(vector, strengths=(1.0,))):
        # what the guard has marked already is what this is about
        replies = [
            replace(reply, degenerate=None) if reply.degenerate == IMPROBABLE else reply
            for reply in trial.replies
        ]
        for reply, value in zip(replies, log_perplexities(engine, replies), strict=True):
            if reply.good and value is not None:
                where = f"{trial.setting.layer} {trial.setting.positions}"
                ratio = math.exp(value - most_surprising)
                rows.append(
                    {"instruction": instruction.id, "setting": where, "ratio": ratio, "text": reply.text}
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instructions", default=",".join(INSTRUCTIONS))
    parser.add_argument("--quant", default="Q8_0")
    parser.add_argument("-n", type=int, default=8, help="validation queries")
    args = parser.parse_args()
    catalog = load_catalog(bundled.CATALOG)
    chosen = [catalog.get(name) for name in args.instructions.split(",")]
    path = bundled.gguf_path("instruct", args.quant)
    with Workers(path, default_threads(), n_ctx=N_CTX, n_seq_max=N_SEQ_MAX) as workers:
        rows_of_each = workers.map(lambda engine, each: measure(engine, catalog, each, args.n), chosen)
    rows = sorted((row for each in rows_of_each for row in each), key=lambda row: -row["ratio"])
    for row in rows[:N_SHOWN]:
        print(f"{row['ratio']:6.2f}  {row['instruction']:16} {row['setting']:10} {row['text']!r}")
    document = {
        "benchmark": "improbable",
        "localsteer": __version__,
        "quantization": args.quant,
        "instructions": [each.id for each in chosen],
        "n": args.n,
        "replies": len(rows),
        "limit": IMPROBABLE_RATIO,
        "beyond_limit": sum(row["ratio"] > IMPROBABLE_RATIO for row in rows),
        "most_improbable": rows[:N_SHOWN],
    }
    print(json.dumps(document, ensure_ascii=False))


if __name__ == "__main__":
    main()
