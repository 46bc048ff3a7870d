"""What the search by likelihood finds, beside the exhaustive search by generation, and what both cost.

    python benchmarks/search.py -m smol [-i title,one_sentence] [-n 20] [--exhaustive] [-o FOLDER]

For each instruction of the general catalogue that the told model follows at least twice in twelve: seconds
(with the extraction), tokens computed, the setting, and how many replies to unseen test questions follow it:
plain, told, steered. --exhaustive adds the search over every layer, positions and strength 1, 2 and 3, which
takes an hour or more for each instruction on two cores; -o keeps what is done, so that a run that was stopped
goes on. Nothing else should run beside it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localsteer import ControlVector, Engine, __version__
from localsteer.catalog import Catalog, Instruction, load_catalog, spread
from localsteer.evaluate.runner import run_conditions, told_replies
from localsteer.extract import extract
from localsteer.model_names import path_of
from localsteer.tune import N_SEQ_MAX, Tuned, tune, tune_exhaustively
from localsteer.verify.judge import judge

N_TOLD, LEAST_TOLD = 12, 2
N_PAIRS = 32  # as first use takes
MAX_TOKENS = 192
N_CHECKED = 8


def main() -> None:
    arguments = _arguments()
    catalog = load_catalog()
    folder = Path(arguments.output) if arguments.output else None
    path = path_of(arguments.model)
    rows = []
    with Engine(path, n_seq_max=N_SEQ_MAX, n_threads=arguments.threads) as engine:
        print(
            f"{path.name}, {platform.machine()}, {engine.context.n_threads} threads, localsteer {__version__}"
        )
        for instruction in _instructions(catalog, arguments.instructions):
            row = _kept(folder, instruction) or measure(engine, catalog, instruction, arguments)
            _keep(folder, row)
            if row["told_of_twelve"] >= LEAST_TOLD:
                rows.append(row)
            print(_line(row), flush=True)
    print(json.dumps({"model": path.name, "rows": rows, "mean": _mean(rows)}))


def measure(
    engine: Engine, catalog: Catalog, instruction: Instruction, arguments: argparse.Namespace
) -> dict[str, Any]:
    validation = catalog.queries_for(instruction, "validation")
    asked = list(validation[:N_TOLD])
    told = told_replies(engine, instruction, asked, max_tokens=MAX_TOKENS)
    n_told = sum(
        bool(judge(instruction, query, reply).followed) for query, reply in zip(asked, told, strict=True)
    )
    row: dict[str, Any] = {"id": instruction.id, "told_of_twelve": n_told}
    if n_told < LEAST_TOLD:
        return row
    started = time.perf_counter()
    vector = extract(engine, instruction, catalog.queries_for(instruction, "extraction"), n_pairs=N_PAIRS)
    extracted = time.perf_counter() - started
    test = spread(catalog.queries_for(instruction, "test"), arguments.n)
    row |= {"extract_seconds": round(extracted, 1)}
    row["likelihood"] = _searched(
        engine, instruction, test, lambda: tune(engine, vector, instruction, validation, n=N_CHECKED)
    )
    if arguments.exhaustive:
        queries = spread(validation, N_CHECKED)
        row["exhaustive"] = _searched(
            engine, instruction, test, lambda: tune_exhaustively(engine, vector, instruction, queries)
        )
    conditions = ("none", "instructed")
    outcomes = _outcomes(engine, instruction, vector, test, conditions)
    return row | {"plain": outcomes["none"], "told": outcomes["instructed"]}


def _searched(engine: Engine, instruction: Instruction, test: Sequence[Any], search: Any) -> dict[str, Any]:
    """Cost and result of one search. follows: share of replies to the test queries."""
    before, started = engine.context.n_tokens, time.perf_counter()
    tuned: Tuned = search()
    row = {
        "seconds": round(time.perf_counter() - started, 1),
        "tokens": engine.context.n_tokens - before,
        "setting": str(tuned.setting),
        "scores": dict(tuned.scores),
    }
    steered = _outcomes(engine, instruction, tuned.vector, test, ("steered",))
    return row | {"follows": steered["steered"]}


def _outcomes(
    engine: Engine,
    instruction: Instruction,
    vector: ControlVector,
    test: Sequence[Any],
    conditions: Sequence[str],
) -> dict[str, float | None]:
    found = run_conditions(
        engine, instruction, vector, test, conditions=conditions, scored=(), max_tokens=MAX_TOKENS
    )
    return {name: rows.followed for name, rows in found.items()}


def _instructions(catalog: Catalog, names: str | None) -> list[Instruction]:
    if names:
        return [catalog.get(name) for name in names.split(",")]
    return [
        instruction.fill()
        for instruction in catalog.instructions.values()
        if instruction.verifier and all(slot in instruction.slots for slot in instruction.open_slots)
    ]


def _kept(folder: Path | None, instruction: Instruction) -> dict[str, Any] | None:
    path = folder / f"{instruction.id}.json" if folder else None
    return json.loads(path.read_text()) if path and path.exists() else None


def _keep(folder: Path | None, row: Mapping[str, Any]) -> None:
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row['id']}.json").write_text(json.dumps(row))


def _line(row: Mapping[str, Any]) -> str:
    if "likelihood" not in row:
        return f"{row['id']:<20} told {row['told_of_twelve']} of {N_TOLD}: left out"
    parts = [f"{row['id']:<20} plain {row['plain']:.0%} told {row['told']:.0%}"]
    for name in ("likelihood", "exhaustive"):
        if name in row:
            search = row[name]
            parts.append(
                f"{name} {search['follows']:.0%} in {search['seconds']:.0f} s, {search['tokens']} tokens, "
                f"{search['setting']}"
            )
    return "; ".join(parts)


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Over the instructions, those where nothing was found among them."""
    if not rows:
        return {}
    means = {name: _average([row[name] for row in rows]) for name in ("plain", "told")}
    means["steered"] = _average([row["likelihood"]["follows"] for row in rows])
    means["seconds"] = _average([row["extract_seconds"] + row["likelihood"]["seconds"] for row in rows])
    both = [row for row in rows if "exhaustive" in row]
    if both:
        ratios = [row["likelihood"]["tokens"] / row["exhaustive"]["tokens"] for row in both]
        means["tokens_of_exhaustive"] = _average(ratios)
        ours = _average([row["likelihood"]["follows"] for row in both])
        means["follows_of_exhaustive"] = ours / max(
            1e-9, _average([row["exhaustive"]["follows"] for row in both])
        )
    return {name: round(value, 3) for name, value in means.items()}


def _average(values: Sequence[float | None]) -> float:
    return sum(value or 0.0 for value in values) / len(values)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", default="smol")
    parser.add_argument("-i", "--instructions")
    parser.add_argument("-n", type=int, default=20, help="test questions each")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--exhaustive", action="store_true")
    parser.add_argument("-o", "--output", help="folder of what is done")
    return parser.parse_args()


if __name__ == "__main__":
    main()
