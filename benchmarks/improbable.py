"""Where `localsteer tune` draws the line between a surprising reply and a broken one, on the bundled model.

    python benchmarks/improbable.py [--instructions json,lowercase,...] [--quant Q8_0] [-n 8]

Every setting of the full grid is asked; of the replies that pass every other check (verifier, subject, no
loop) the most improbable are shown, with how many times as surprising each is as the most surprising reply
that the model gives by itself. Whether they are sound text is for the reader to say. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from localsteer import __version__, bundled
from localsteer.bridge import default_threads
from localsteer.catalog import Catalog, Instruction, load_catalog
from localsteer.engine import Engine
from localsteer.evaluate.judge import log_perplexities
from localsteer.evaluate.pick import Round, search
from localsteer.evaluate.study import spread
from localsteer.evaluate.tune import ALL, IMPROBABLE_RATIO, Natural, grid
from localsteer.evaluate.workers import Workers
from localsteer.extract import extract

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
    natural = Natural.ask(engine, instruction, queries, MAX_TOKENS)
    trials = search(
        engine,
        vector,
        instruction,
        queries,
        grid(vector),
        rounds=(Round(ALL, n),),
        max_tokens=natural.limit,
        must_end=natural.must_end,
        plain=natural.plain,
    )
    rows = []
    for trial in (each for each in trials if each.setting is not None):
        logs = log_perplexities(engine, trial.replies)
        for reply, value in zip(trial.replies, logs, strict=True):
            if reply.good and value is not None:
                where = f"{trial.setting.layer} {trial.setting.positions}"
                ratio = math.exp(value - natural.most_surprising)
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
        found = workers.map(lambda engine, each: measure(engine, catalog, each, args.n), chosen)
    rows = sorted((row for each in found for row in each), key=lambda row: -row["ratio"])
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
