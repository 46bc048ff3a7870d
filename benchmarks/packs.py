"""A pack's vectors on questions that no search has seen: plain, steered, told, and both.

    python benchmarks/packs.py -m MODEL.gguf [--packs FOLDER] [-i title,json] [-n 20] [-o ROWS.json]

The figures in a pack come from the questions that its settings were chosen on. Here the same vectors answer
test questions of the catalogue, with the judge and the intervals of `localsteer eval`. Instructions where
nothing helps are in the mean with what the model does by itself. -o keeps what is done. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

from localsteer import Engine
from localsteer.cache import atomic_path
from localsteer.catalog import load_catalog, spread
from localsteer.evaluate.intervals import wilson
from localsteer.evaluate.outcomes import Outcomes
from localsteer.evaluate.runner import run_conditions
from localsteer.model_names import path_of
from localsteer.packs import Pack, pack_for

CONDITIONS = ("none", "steered", "instructed", "both")
MAX_TOKENS = 192
N_SEQ_MAX = 16


def main() -> None:
    arguments = _arguments()
    if arguments.packs:
        os.environ["LOCALSTEER_PACKS"] = str(arguments.packs)
    path = path_of(arguments.model)
    match = pack_for(path)
    if match is None:
        raise SystemExit(f"no pack fits {path.name}: --packs names a folder of packs.")
    rows = json.loads(arguments.output.read_text()) if arguments.output and arguments.output.exists() else {}
    wanted = arguments.instructions.split(",") if arguments.instructions else list(match.pack.instructions)
    print(f"{match.pack.title}; {platform.machine()}, {arguments.n} test questions")
    with Engine(path, n_seq_max=N_SEQ_MAX, n_threads=arguments.threads) as engine:
        for name in wanted:
            if name not in rows:
                rows[name] = measure(engine, match.pack, name, arguments.n)
                if arguments.output:
                    with atomic_path(arguments.output) as temporary:
                        temporary.write_text(json.dumps(rows, indent=1))
            print(_line(name, rows[name]), flush=True)
    means = {key: sum(row[key][0] for row in rows.values()) / len(rows) for key in CONDITIONS}
    print(json.dumps({"model": match.pack.model, "n": arguments.n, "rows": rows, "mean": means}))


def measure(engine: Engine, pack: Pack, name: str, n: int) -> dict[str, Any]:
    """For each condition: share that follows, its 95% interval, and the share that names its subject."""
    catalog = load_catalog(pack.catalog)
    instruction, vector = catalog.get(name).fill(), pack.vector(name)
    questions = spread(catalog.queries_for(instruction, "test"), n)
    applied = CONDITIONS if pack.instructions[name].helps else ("none", "instructed")
    conditions = run_conditions(
        engine, instruction, vector, questions, conditions=applied, scored=(), max_tokens=MAX_TOKENS
    )
    shown = {
        key: conditions.get(key, conditions["instructed" if key == "both" else "none"]) for key in CONDITIONS
    }
    return {key: _figures(rows) for key, rows in shown.items()} | {"helps": len(applied) == 4}


def _figures(rows: Outcomes) -> tuple[float, float, float, float | None]:
    followed = rows.followed or 0.0
    low, high = wilson(round(followed * rows.n), rows.n)
    return followed, round(low, 3), round(high, 3), rows.subject_kept


def _line(name: str, row: dict[str, Any]) -> str:
    parts = [f"{key} {row[key][0]:.0%} ({row[key][1]:.0%} to {row[key][2]:.0%})" for key in CONDITIONS]
    return f"{name:<16} {', '.join(parts)}{'' if row['helps'] else '; nothing is applied'}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", default="smol")
    parser.add_argument("--packs", type=Path)
    parser.add_argument("-i", "--instructions")
    parser.add_argument("-n", type=int, default=20)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("-o", "--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
